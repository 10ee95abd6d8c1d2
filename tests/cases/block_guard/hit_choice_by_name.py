# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn1": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": ["torch.nn.modules.conv.Conv2d", "toy.PatchEmbed"]}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            hidden_states = (
                self._gradient_checkpointing_func(block, hidden_states)
                if checkpoint
                else block(hidden_states)
            )
        return (self.proj_out(hidden_states),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, context=None, rope=None, mask=None, return_dict=True):
        checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self.x_embedder(hidden_states)
        for block in self.blocks:
            if region.owns(block):
                hidden_states = (
                    block(hidden_states)
                )
        return (self.proj_out(hidden_states),)
