"""The constant prompt embedding as a context."""

import torch

from icmsr_core.backbone.context import repeated_context


def test_every_sample_gets_the_embedding_in_the_latent_s_type() -> None:
    embedding, latent = torch.randn(7, 16), torch.zeros(3, 4, 8, 8, dtype=torch.float16)
    context = repeated_context(embedding, latent)
    assert context.dtype == torch.float16
    assert context.shape == (3, 7, 16)
    assert all(torch.equal(one, embedding.half()) for one in context)


def test_it_is_a_view_because_a_fixed_step_knows_its_context_by_the_memory() -> None:
    embedding = torch.randn(7, 16)
    context = repeated_context(embedding, torch.zeros(5, 4, 8, 8))
    assert context.data_ptr() == embedding.data_ptr()
    assert context.stride() == (0, 16, 1)
