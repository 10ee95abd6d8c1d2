# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}, "companions": {"others": ["Block"]}}], "attention": {"blocks.*.attn": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": []}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None):
        for i, (block, other) in enumerate(zip(self.blocks, self.others)):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
            hidden_states = hidden_states.transpose(0, 1)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(other, hidden_states, temb)
            else:
                hidden_states = other(hidden_states, temb)
            hidden_states = hidden_states.transpose(0, 1)
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, temb=None):
        for i, (block, other) in enumerate(zip(self.blocks, self.others)):
            if region.owns(block):
                hidden_states = block(hidden_states)
            hidden_states = hidden_states.transpose(0, 1)
            if region.owns(block):
                hidden_states = other(hidden_states, temb)
            hidden_states = hidden_states.transpose(0, 1)
        return (self.proj_out(hidden_states),)
