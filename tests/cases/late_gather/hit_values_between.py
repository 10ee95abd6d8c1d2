# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}, "tail": {"stream": "hidden_states", "statements": ["shift = shift.to(hidden_states.dtype)", "hidden_states = (\n            self.norm_out(hidden_states) * (1 + scale)\n            + shift  # for all tokens\n        )"], "result": "hidden_states"}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None, return_dict=True):
        hidden_states = self.embed(hidden_states)

        for block in self.blocks:
            hidden_states = block(hidden_states, temb)

        if temb.ndim == 3:
            shift, scale = temb.chunk(2, dim=2)
        else:
            shift, scale = temb[:, None].chunk(2, dim=2)
        shift = shift.to(hidden_states.dtype)
        hidden_states = (
            self.norm_out(hidden_states) * (1 + scale)
            + shift  # for all tokens
        )
        hidden_states = hidden_states.squeeze(1)
        output = hidden_states.reshape(-1, self.height, self.width)
        return (output,)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None, return_dict=True):
        hidden_states = self.embed(hidden_states)

        for block in self.blocks:
            hidden_states = block(hidden_states, temb)

        if temb.ndim == 3:
            shift, scale = temb.chunk(2, dim=2)
        else:
            shift, scale = temb[:, None].chunk(2, dim=2)
        shift = shift.to(hidden_states.dtype)
        hidden_states = (
            self.norm_out(hidden_states) * (1 + scale)
            + shift  # for all tokens
        )
        hidden_states = region.gather(hidden_states, 1, "hidden_states")
        hidden_states = hidden_states.squeeze(1)
        output = hidden_states.reshape(-1, self.height, self.width)
        return (output,)
