# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None, return_dict=True):
        hidden_states = self.embed(hidden_states)

        for block in self.blocks:
            hidden_states = block(hidden_states, temb)

        hidden_states = hidden_states - hidden_states.mean(dim=1, keepdim=True)
        output = self.proj_out(hidden_states)
        return (output,)
