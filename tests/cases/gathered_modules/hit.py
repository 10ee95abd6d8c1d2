# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {}, "processors": [], "layers": [], "mixing": {"gathered": {"blocks.*.moe": {"module": "toy.Experts", "inputs": {"x": {"dim": 1, "streams": ["hidden_states"], "rows": false, "repeats": 1}}, "outputs": {"": {"dim": 1, "streams": ["hidden_states"], "rows": false, "repeats": 1}}}}}}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    gathered_modules = {
        "blocks.*.moe": GatheredModule(
            "toy.Experts", {"x": TokenCut(1, ("hidden_states",))}, {"": TokenCut(1, ("hidden_states",))}
        )
    }
    def forward(self, hidden_states, temb=None, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return (self.proj_out(hidden_states),)
