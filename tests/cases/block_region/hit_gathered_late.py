# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}, "tail": {"stream": "hidden_states", "statements": ["output = self.proj_out(hidden_states)"], "result": "output"}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        hidden_states = self.embed(hidden_states.flatten(2).transpose(1, 2))
        for refiner in self.refiners:
            context = refiner(context)
        for index, layer in enumerate(self.blocks):
            hidden_states = layer(hidden_states, context)
        output = self.proj_out(hidden_states)
        return output
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        hidden_states = self.embed(hidden_states.flatten(2).transpose(1, 2))
        for refiner in self.refiners:
            context = refiner(context)
        region = self._begin_region("blocks", {"hidden_states": hidden_states.shape[1]}, latents="hidden_states")
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        for index, layer in enumerate(self.blocks):
            hidden_states = region.hand_over(hidden_states)
            hidden_states = layer(hidden_states, context)
        output = self.proj_out(hidden_states)
        return output
