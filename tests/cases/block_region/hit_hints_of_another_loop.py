# facts: {"loops": [{"blocks": "blocks", "lengths": {"control": ["control", 1]}, "latents": "control", "context": null, "rows": [[2, 1], [3, 1]], "ndim": 4, "other_rows": {"5": [[3, 1], [4, 1]]}, "values": {"control": [{"dim": 1, "streams": ["control"], "item": null, "keys": null, "ndim": 3, "optional": false}], "hidden_states": [{"dim": 1, "streams": ["control"], "item": null, "keys": null, "ndim": 3, "optional": false}], "rope": [{"dim": 0, "streams": ["control"], "item": null, "keys": null, "ndim": 2, "optional": false}]}, "travels": ["hidden_states"], "fresh": {"hint": "control"}, "filled": ["hints"], "after": {"hints": [{"dim": 1, "streams": ["control"], "item": null, "keys": null, "ndim": 3, "optional": true}]}}], "attention": {"blocks.*.attn": ["control"]}, "processors": ["toy.Proc"], "layers": []}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, control=None, scales=None, rope=None, return_dict=True):
        hints = []
        for index, block in enumerate(self.blocks):
            hint, control = block(hidden_states, control, rope)
            hints.append((hint, scales[index]))
        for hint, scale in hints:
            hidden_states = hidden_states + hint * scale
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, control=None, scales=None, rope=None, return_dict=True):
        hints = []
        region = self._begin_region(
            "blocks", {"control": control.shape[1]}, latents="control", rows={2: 1, 3: 1}, other_rows={5: {3: 1, 4: 1}}
        )
        control = region.shard(control, 1, "control")
        hidden_states = region.shard(hidden_states, 1, "control")
        local_rope = region.shard(rope, 0, "control")
        hint = control
        for index, block in enumerate(self.blocks):
            control, hidden_states, hints = region.hand_over(control, hidden_states, hints)
            hint, control = block(hidden_states, control, local_rope)
            hints.append((hint, scales[index]))
        control = region.gather(control, 1, "control")
        hidden_states = region.gather(hidden_states, 1, "control")
        hints = region.gather(hints, 1, "control", ndim=3)
        for hint, scale in hints:
            hidden_states = hidden_states + hint * scale
        return (self.proj_out(hidden_states),)
