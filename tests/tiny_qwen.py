"""A tiny Qwen2 that vLLM serves in tests, and how far vLLM's log-probs are from Hugging Face's."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

VOCAB = 512
MAX_MODEL_LEN = 256
EOS = 1
PROMPTS = [[3 + index, 5, 7 + index % 3] for index in range(8)]
# vLLM's prefix cache on a CPU keeps whole blocks of 128 tokens: only this one gets into it.
PROMPTS.append([3 + (7 * position) % 500 for position in range(200)])
TOLERANCE = 1e-4  # natural-log probabilities in fp32


def make_model(tied: bool, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        eos_token_id=EOS,
    )
    return Qwen2ForCausalLM(config).float().eval()


def randomize(model: Qwen2ForCausalLM, seed: int) -> None:
    """New random weights, norms and biases included, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            if parameter.dim() == 1:
                parameter.add_(1.0)


def weights_of(model: Qwen2ForCausalLM):
    """(name, tensor) of every distinct parameter; a tied head is the embedding and comes once."""
    return ((name, parameter.detach()) for name, parameter in model.named_parameters())


@torch.no_grad()
def largest_difference(model, groups, temperature, top_p=1.0) -> float:
    """Between vLLM's log-probs and those of model's temperature-scaled, nucleus-cut distribution."""
    largest = 0.0
    for sample in (sample for group in groups for sample in group):
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        at = torch.arange(len(sample.prompt_ids) - 1, len(ids) - 1)
        logprobs = (model(ids[None]).logits[0, at].double() / temperature).log_softmax(-1)
        if top_p < 1:
            ordered, order = logprobs.sort(-1, descending=True)
            before = ordered.exp().cumsum(-1) - ordered.exp()
            outside = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, order, before >= top_p)
            logprobs = logprobs.masked_fill(outside, -torch.inf).log_softmax(-1)
        expected = logprobs.gather(-1, ids[at + 1, None])[:, 0]
        got = torch.tensor(sample.rollout_logprobs, dtype=torch.float64)
        largest = max(largest, (got - expected).abs().max().item())
    return largest
