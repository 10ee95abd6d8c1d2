class ToyProcessor:
    def __call__(self, attn, hidden_states, mask=None):
        batch_size, sequence_length, _ = hidden_states.shape
        if mask is not None:
            # one a head
            mask = attn.prepare_attention_mask(mask, sequence_length, batch_size)
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
