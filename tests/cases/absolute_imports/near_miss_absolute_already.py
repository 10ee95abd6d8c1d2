class ToyProcessor:
    def __call__(self, attn, hidden_states, context=None, mask=None):
        from toy_package.embeddings import apply_rotary_emb

        return attn.to_out(apply_rotary_emb(hidden_states))
