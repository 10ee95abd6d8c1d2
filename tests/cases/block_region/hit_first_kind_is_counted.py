# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": "before", "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}], "temb": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {"blocks.*.attn": ["hidden_states"]}, "processors": ["toy.Proc"], "layers": [], "mixing": {"kinds": {"blocks": {"hidden_states": {"parameter": "current", "place": 2, "counted": 0}}}}}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, history, temb):
        current = hidden_states.shape[1]
        hidden_states = torch.cat([history, hidden_states], dim=1)
        for block in self.blocks:
            hidden_states = block(hidden_states, temb=temb, current=self.config.memory)
        return self.proj_out(hidden_states[:, -current:])
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, history, temb):
        current = hidden_states.shape[1]
        hidden_states = torch.cat([history, hidden_states], dim=1)
        region = self._begin_region(
            "blocks",
            {"hidden_states": hidden_states.shape[1]},
            latents="hidden_states",
            context="before",
            kinds={"hidden_states": (self.config.memory, hidden_states.shape[1] - self.config.memory)},
        )
        local_current = region.rows("hidden_states.0")
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        local_temb = region.shard(temb, 1, "hidden_states")
        for block in self.blocks:
            hidden_states = region.hand_over(hidden_states)
            hidden_states = block(hidden_states, temb=local_temb, current=local_current)
        hidden_states = region.gather(hidden_states, 1, "hidden_states")
        return self.proj_out(hidden_states[:, -current:])
