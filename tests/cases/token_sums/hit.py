# facts: {"token_sums": ["key.sum(dim=-1, keepdim=True)", "torch.matmul(value, key)"]}
class ToyProcessor:
    def __call__(self, attn, hidden_states):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # one normaliser a head
        z = 1 / (key.sum(dim=-1, keepdim=True).transpose(-2, -1) @ query + 1e-15)
        scores = torch.matmul(value, key)
        hidden_states = torch.matmul(scores, query) * z
        return attn.to_out[0](hidden_states)
# output
class ToyProcessor:
    def __call__(self, attn, hidden_states):
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        # one normaliser a head
        z = 1 / (attn.sum_over_tokens(key.sum(dim=-1, keepdim=True)).transpose(-2, -1) @ query + 1e-15)
        scores = attn.sum_over_tokens(torch.matmul(value, key))
        hidden_states = torch.matmul(scores, query) * z
        return attn.to_out[0](hidden_states)
