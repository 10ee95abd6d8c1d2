class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        from .embeddings import apply_rotary_emb

        return attn.to_out(apply_rotary_emb(hidden_states))
# output
class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        from embeddings import apply_rotary_emb

        return attn.to_out(apply_rotary_emb(hidden_states))
