# facts: {"loops": [{"blocks": "blocks", "lengths": {"hidden_states": ["hidden_states", 1]}, "latents": "hidden_states", "context": null, "rows": [], "values": {"hidden_states": [{"dim": 1, "streams": ["hidden_states"], "item": null, "keys": null, "ndim": 3, "optional": false}]}}], "attention": {}, "processors": [], "layers": [], "mixing": {"rows": {"blocks": {"hidden_states": "height"}}, "row_layers": {"blocks.*.ff.conv": "hidden_states"}}}
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, height, width, return_dict=True):
        for block in self.blocks:
            hidden_states = block(hidden_states, height, width)
        return (self.proj_out(hidden_states).unflatten(1, (height, width)),)
# output
class ToyModel(ModelMixin):
    def __init__(self):
        super().__init__()

    def forward(self, hidden_states, height, width, return_dict=True):
        region = self._begin_region(
            "blocks",
            {"hidden_states": hidden_states.shape[1]},
            latents="hidden_states",
            row_counts={"hidden_states": height},
        )
        local_height = region.count_rows(height, "hidden_states")
        hidden_states = region.shard(hidden_states, 1, "hidden_states")
        for block in self.blocks:
            hidden_states = region.hand_over(hidden_states)
            hidden_states = block(hidden_states, local_height, width)
        hidden_states = region.gather(hidden_states, 1, "hidden_states")
        return (self.proj_out(hidden_states).unflatten(1, (height, width)),)
