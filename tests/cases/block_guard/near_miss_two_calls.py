# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
# error: 2 calls of a block in one iteration
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        for block in self.blocks:
            if mask is None:
                hidden_states = block(hidden_states)
            hidden_states = block(hidden_states, mask)
        return (self.proj_out(hidden_states),)
