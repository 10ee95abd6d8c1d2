# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": []}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        for block in self.blocks:
            if mask is None:
                hidden_states = block(hidden_states)
            elif rope is None:
                hidden_states = block(hidden_states, mask)
            else:
                hidden_states = block(hidden_states, mask, rope)
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        for block in self.blocks:
            if mask is None:
                if region.owns(block):
                    hidden_states = block(hidden_states)
            elif rope is None:
                if region.owns(block):
                    hidden_states = block(hidden_states, mask)
            else:
                if region.owns(block):
                    hidden_states = block(hidden_states, mask, rope)
        return (self.proj_out(hidden_states),)
