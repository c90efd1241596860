"""The attentive probe: it reads what an average over patches cannot, and its heads do not know of one another."""

from __future__ import annotations

import torch

from fastjepa.evaluation.attentive import AttentiveHead, AttentiveHeads

CPU = torch.device("cpu")


def sets(count: int, seed: int):
    """Tokens of which one, marked in the first feature, says the class in the second; the others say anything."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 6, 8, generator=generator)
    tokens[..., 0] = 0.0
    labels = torch.randint(0, 2, (count,), generator=generator)
    place = torch.randint(0, 6, (count,), generator=generator)
    tokens[torch.arange(count), place, 0] = 4.0
    tokens[torch.arange(count), place, 1] = 4.0 * labels - 2.0
    return tokens, labels


def fit(lr, weight_decay, seed=0, epochs=30):
    tokens, labels = sets(400, 1)
    heads = AttentiveHeads(8, 2, 2, lr, weight_decay, CPU, seed)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).split(50)
    return heads.fit(lambda epoch: ((tokens[b], labels[b]) for b in order), epochs, 8)


def test_it_finds_the_token_that_says_it():
    heads = fit([3e-3], [0.01])
    tokens, labels = sets(200, 2)
    assert (heads.predict(tokens)[0] == labels).double().mean() > 0.9


def test_heads_do_not_know_of_one_another():
    together = fit([1e-3, 5e-3], [0.01, 0.1], epochs=2)
    torch.manual_seed(123)  # the random state outside changes nothing
    for _ in range(2):
        again = fit([1e-3, 5e-3], [0.01, 0.1], epochs=2)
        for a, b in zip(together.heads[1].parameters(), again.heads[1].parameters(), strict=True):
            assert torch.equal(a, b)
    alone = fit([1e-3], [0.01], epochs=2)
    for a, b in zip(together.heads[0].parameters(), alone.heads[0].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_random_state_outside_is_left_alone():
    state = torch.get_rng_state()
    AttentiveHeads(8, 2, 2, [1e-3], [0.0], CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_token_is_all_there_is_to_attend_to():
    head = AttentiveHead(8, 3, 2)
    torch.nn.init.normal_(head.head.weight)
    token = torch.randn(4, 1, 8)
    value = head.kv(head.norm(token))[..., 8:].squeeze(1)
    torch.testing.assert_close(head(token), head.head(head.out_norm(head.proj(value))))
