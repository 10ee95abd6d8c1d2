# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {}, "processors": [], "layers": [], "mixing": {"gathered": {"blocks.*.pool": {"module": "toy.Pool", "inputs": {"x": {"dim": 2, "streams": ["hidden_states"], "rows": true, "repeats": 1}}, "outputs": {"0": {"dim": 0, "streams": ["hidden_states"], "rows": true, "repeats": 2}}}}}}
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
        "blocks.*.pool": GatheredModule(
            "toy.Pool",
            {"x": TokenCut(2, ("hidden_states",), rows=True)},
            {"0": TokenCut(0, ("hidden_states",), rows=True, repeats=2)},
        )
    }
    def forward(self, hidden_states, temb=None, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return (self.proj_out(hidden_states),)
