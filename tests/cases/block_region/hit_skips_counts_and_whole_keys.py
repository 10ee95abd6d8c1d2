# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1], "layers": ["layers[0]", 1], "context": ["context", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}], "layers": [{"dim": 1, "streams": ["layers"], "item": null, "keys": null, "ndim": 3, "optional": false}], "controls": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}, "whole": ["context"], "filled": ["skips"], "after": {"layer": [{"dim": 1, "streams": ["layers"], "item": null, "keys": null, "ndim": 3, "optional": false}]}, "counts": {"length": ["hidden_states"]}}], "attention": {"blocks.*.attn": ["context", "hidden_states", "layers"]}, "processors": ["toy.Proc"], "layers": [], "queries": {"blocks.*.attn": ["hidden_states", "layers"]}}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, layers=None, controls=None, return_dict=True):
        length = hidden_states.shape[1]
        skips = []
        for index, block in enumerate(self.blocks):
            layer = layers[index]
            joint = torch.cat([hidden_states, layer], dim=1)
            if index > 2:
                hidden_states = block(joint, context, skips.pop() + controls.pop())
            else:
                hidden_states = block(joint, context)
            hidden_states = hidden_states[:, :length]
            skips.append(hidden_states)
        hidden_states = self.norm_out(hidden_states, layer.shape[1], length)
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, layers=None, controls=None, return_dict=True):
        length = hidden_states.shape[1]
        skips = []
        region = self._begin_region(
            "blocks",
            {"hidden_states": hidden_states.shape[1], "layers": layers[0].shape[1], "context": context.shape[1]},
            latents="hidden_states",
        )
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        local_layers = region.shard(layers, 1, "layers")
        controls = region.shard(controls, 1, "hidden_states")
        local_length = region.rows("hidden_states")
        for index, block in enumerate(self.blocks):
            hidden_states, skips = region.hand_over(hidden_states, skips)
            layer = local_layers[index]
            joint = torch.cat([hidden_states, layer], dim=1)
            if index > 2:
                hidden_states = block(joint, context, skips.pop() + controls.pop())
            else:
                hidden_states = block(joint, context)
            hidden_states = hidden_states[:, :local_length]
            skips.append(hidden_states)
        hidden_states = region.gather(hidden_states, 1, "hidden_states")
        layer = region.gather(layer, 1, "layers")
        hidden_states = self.norm_out(hidden_states, layer.shape[1], length)
        return (self.proj_out(hidden_states),)
