# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn": ["hidden_states", "context"]}, "processors": [], "layers": [], "batch_processors": ["toy.PerturbedProcessor"]}
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

    submodule_classes_to_wrap = []
    submodule_name_to_wrap = ["attn"]
    attention_streams = {"blocks.*.attn": ("hidden_states", "context")}
    block_loops = ("blocks",)
    batch_processors = ("toy.PerturbedProcessor",)

    def forward(self, hidden_states, temb=None, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states, temb)
        return (self.proj_out(hidden_states),)
