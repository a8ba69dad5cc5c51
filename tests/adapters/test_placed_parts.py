"""Hand-made proposals, placed on a base and run: what each comes to, and what is refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.adapter_extras import NO_EXTRAS
from adapters.base_parts import FusedPart
from adapters.errors import AdapterRefused, RefusalCode
from adapters.module_names import BaseModules, LinearShape
from adapters.proposal import (
    EmbeddingProposal,
    ExpertProposal,
    Proposal,
    TokensProposal,
    VectorProposal,
    WholeProposal,
)
from tests.adapters.proposed import (
    BASE,
    EMBED,
    HEAD,
    NORM,
    OUT,
    FakeWeights,
    H,
    K,
    Q,
    V,
    of_pair,
    pair,
    run_proposal,
    tied,
)


def refused(code: RefusalCode, *args: Any, **options: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        run_proposal(*args, **options)
    assert caught.value.reason is code, str(caught.value)
    return caught.value


def test_plain_pairs_have_no_extras(tmp_path: Path) -> None:
    tensors = of_pair() | of_pair(K, r=3)
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(), pair(K, r=3))), tensors)
    assert ran.extras is NO_EXTRAS and list(ran.modules) == [Q, K]
    assert torch.equal(ran.modules[K].lora_b, (tensors[f"{K}.B"] * 2.0).T)
    assert torch.equal(ran.modules[Q].lora_a, tensors[f"{Q}.A"])


def test_a_gain_is_of_the_replaced_weight_and_in_b(tmp_path: Path) -> None:
    weights, magnitude = FakeWeights(), torch.rand(OUT) + 0.5
    told: list[tuple[int, int]] = []
    tensors = of_pair() | {"m": magnitude}
    proposal = Proposal(pairs=(pair(magnitude="m"),))
    ran = run_proposal(tmp_path, proposal, tensors, weights=weights, progress=lambda *counts: told.append(counts))
    lora_a, lora_b = tensors[f"{Q}.A"], tensors[f"{Q}.B"] * 2.0
    gain = magnitude / (weights.tensors[f"{Q}.weight"] + lora_b @ lora_a).norm(dim=1)
    torch.testing.assert_close(ran.extras.gains[Q], gain)
    torch.testing.assert_close(ran.modules[Q].lora_b, (gain[:, None] * lora_b).T)
    assert ran.extras.base_print == "print" and not ran.extras.gain_covers_bias and told == [(OUT, OUT)]


def test_a_gain_of_a_head_that_is_replaced_is_of_what_replaces_it(tmp_path: Path) -> None:
    weights, whole = FakeWeights(), torch.randn(V, H)
    tensors = of_pair(HEAD, out_features=V) | {"m": torch.rand(V) + 0.5, "w": whole}
    proposal = Proposal(pairs=(pair(HEAD, magnitude="m"),), wholes=(WholeProposal(source=HEAD, weight="w"),))
    ran = run_proposal(tmp_path, proposal, tensors, weights=weights)
    delta = 2.0 * tensors[f"{HEAD}.B"] @ tensors[f"{HEAD}.A"]
    torch.testing.assert_close(ran.extras.gains[HEAD], tensors["m"] / (whole + delta).norm(dim=1))
    assert ran.extras.head is not None and ran.extras.head.weight is not None
    assert torch.equal(ran.extras.head.weight, whole) and ran.extras.replaced == {HEAD}


def doubled(stored: Any, in_features: int, out_features: int, *, by: float) -> tuple[Tensor, Tensor]:
    SEEN.append(stored[0].dtype)
    return stored[0].float() * by, stored[1].float()


SEEN: list[torch.dtype] = []


def test_folds_see_what_is_stored_and_may_share_inputs(tmp_path: Path) -> None:
    fold = partial(doubled, by=3.0)
    shared = {"inputs": ("A", "B"), "fold": fold}
    tensors = {"A": torch.randn(2, H).half(), "B": torch.randn(OUT, 2).half()}
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(**shared), pair(K, **shared))), tensors, dtype=torch.bfloat16)
    assert SEEN[-2:] == [torch.float16] * 2  # what is shared is large, and is not converted whole for each
    for module in (Q, K):
        assert torch.equal(ran.modules[module].lora_a, (tensors["A"].float() * 3).to(torch.bfloat16))
        assert torch.equal(ran.modules[module].lora_b, (tensors["B"].float() * 2).to(torch.bfloat16).T)


def test_a_fold_of_another_shape_than_it_said_is_our_own_fault(tmp_path: Path) -> None:
    def short(stored: Any, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
        return stored[0][:1], stored[1]

    with pytest.raises(ValueError, match="a fold gave"):
        run_proposal(tmp_path, Proposal(pairs=(pair(fold=short),)), of_pair())


def test_biases_are_differences_and_those_of_the_base_are_dropped(tmp_path: Path) -> None:
    weights = FakeWeights()
    own, own_b = weights.tensors[f"{Q}.bias"] + torch.arange(OUT), torch.randn(OUT)
    tensors = of_pair() | {"b": own, "lb": own_b}
    vectors = (VectorProposal(kind="bias", source=Q, input="b"),)
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(bias="lb"),), vectors=vectors), tensors, weights=weights)
    torch.testing.assert_close(ran.extras.biases[Q], torch.arange(OUT) + 2.0 * own_b)
    assert ran.extras.replaced == {f"{Q}.bias"} and ran.dropped == ()
    of_the_base = of_pair() | {"b": weights.tensors[f"{Q}.bias"]}
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(),), vectors=vectors), of_the_base, weights=weights)
    assert ran.dropped == ("b",) and not ran.extras.biases and not ran.extras.replaced


def test_scalings_of_inputs_and_outputs_are_told_apart_by_shape(tmp_path: Path) -> None:
    gain, scale = torch.randn(OUT, 1), torch.randn(1, H)
    vectors = (VectorProposal(kind="ia3", source=Q, input="g"), VectorProposal(kind="ia3", source=K, input="s"))
    ran = run_proposal(tmp_path, Proposal(vectors=vectors), {"g": gain, "s": scale})
    assert torch.equal(ran.extras.gains[Q], gain[:, 0]) and torch.equal(ran.extras.input_scales[K], scale[0])
    assert ran.extras.gain_covers_bias == {Q} and len(ran.modules) == 0 and ran.extras.base_print == ""
    refused(RefusalCode.SHAPE_MISMATCH, tmp_path, Proposal(vectors=vectors), {"g": gain, "s": torch.randn(H, 1)})


def test_a_replaced_bias_under_a_gain_is_scaled_by_it(tmp_path: Path) -> None:
    weights, gain = FakeWeights(), torch.randn(OUT, 1)
    vectors = (VectorProposal(kind="bias", source=Q, input="b"), VectorProposal(kind="ia3", source=Q, input="g"))
    own = weights.tensors[f"{Q}.bias"] + 1.0
    ran = run_proposal(tmp_path, Proposal(vectors=vectors), {"b": own, "g": gain}, weights=weights)
    torch.testing.assert_close(ran.extras.biases[Q], gain[:, 0])


def test_norms_replace_in_the_compute_dtype(tmp_path: Path) -> None:
    values = torch.randn(H)
    proposal = Proposal(vectors=(VectorProposal(kind="norm", source=NORM, input="n"),))
    ran = run_proposal(tmp_path, proposal, {"n": values}, dtype=torch.bfloat16)
    assert torch.equal(ran.extras.norms[f"{NORM}.weight"], values.to(torch.bfloat16))
    assert ran.extras.replaced == {f"{NORM}.weight"}
    proposal = Proposal(vectors=(VectorProposal(kind="bias", source=NORM, input="n"),))
    assert "no bias" in str(refused(RefusalCode.SHAPE_MISMATCH, tmp_path, proposal, {"n": values}))


@pytest.mark.parametrize("part", [EMBED, HEAD])
@pytest.mark.parametrize("num_changed", [0, 2, V])
def test_whole_parts_are_dropped_or_rows_or_kept(part: str, num_changed: int, tmp_path: Path) -> None:
    weights = FakeWeights()
    whole = weights.tensors[f"{part}.weight"].clone()
    whole[3 : 3 + num_changed] += 1.0
    proposal = Proposal(wholes=(WholeProposal(source=part, weight="w", is_copy=True),))
    ran = run_proposal(tmp_path, proposal, {"w": whole}, weights=weights)
    found = ran.extras.embedding if part == EMBED else ran.extras.head
    if num_changed == 0:
        assert ran.dropped == ("w",) and found is None and not ran.extras
    elif num_changed == 2:
        assert found is not None and found.rows is not None and found.weight is None
        assert found.rows.ids.tolist() == [3, 4] and torch.equal(found.rows.values, whole[3:5])
        assert ran.extras.replaced == {f"{part}[3]", f"{part}[4]"}
    else:
        assert found is not None and found.weight is not None and torch.equal(found.weight, whole)
        assert ran.extras.replaced == {part} and ran.extras.base_print == "print"


def test_a_whole_part_over_the_limit_names_the_flag(tmp_path: Path) -> None:
    proposal, tensors = Proposal(wholes=(WholeProposal(source=EMBED, weight="w"),)), {"w": torch.randn(V, H)}
    error = refused(
        RefusalCode.TOO_LARGE, tmp_path, proposal, tensors, weights=FakeWeights(), max_full_bytes=4 * V * H - 1
    )
    assert f"--max-full-bytes {4 * V * H}" in error.fix
    run_proposal(tmp_path, proposal, tensors, weights=FakeWeights(), max_full_bytes=4 * V * H)


@pytest.mark.parametrize("is_tied", [False, True])
def test_rows_of_tokens_are_sorted_and_a_tied_head_has_them_too(is_tied: bool, tmp_path: Path) -> None:
    values = torch.randn(3, H)
    tokens = TokensProposal(source=EMBED, input="t", ids=(9, 2, 5), is_only=True)
    base = tied() if is_tied else BASE
    ran = run_proposal(tmp_path, Proposal(tokens=(tokens,)), {"t": values}, base=base)
    assert ran.extras.embedding is not None and ran.extras.embedding.rows is not None
    assert ran.extras.embedding.rows.ids.tolist() == [2, 5, 9]
    assert torch.equal(ran.extras.embedding.rows.values, values[[1, 2, 0]])
    assert (ran.extras.head is not None) == is_tied
    if ran.extras.head is not None and ran.extras.head.rows is not None:
        assert torch.equal(ran.extras.head.rows.values, values[[1, 2, 0]])
    both = (tokens, TokensProposal(source=HEAD, input="h", ids=(1,), is_only=False))
    proposal = Proposal(tokens=(replace(tokens, is_only=False), both[1]))
    ran = run_proposal(tmp_path, proposal, {"t": values, "h": values[:1].clone()}, base=base)
    assert ran.extras.head is not None and ran.extras.head.rows is not None
    assert ran.extras.head.rows.ids.tolist() == [1]


def test_trained_rows_lie_upon_those_of_a_whole_part(tmp_path: Path) -> None:
    weights = FakeWeights()
    whole = weights.tensors[f"{EMBED}.weight"].clone()
    whole[[4, 8]] += 1.0
    values = torch.randn(2, H)
    proposal = Proposal(
        wholes=(WholeProposal(source=EMBED, weight="w", is_copy=True),),
        tokens=(TokensProposal(source=EMBED, input="t", ids=(8, 1), is_only=True),),
    )
    ran = run_proposal(tmp_path, proposal, {"w": whole, "t": values}, weights=weights)
    assert ran.extras.embedding is not None and ran.extras.embedding.rows is not None
    assert ran.extras.embedding.rows.ids.tolist() == [1, 4, 8]
    assert torch.equal(ran.extras.embedding.rows.values, torch.stack([values[1], whole[4], values[0]]))


def test_a_larger_vocabulary_needs_rows_of_its_own_in_both(tmp_path: Path) -> None:
    weights = FakeWeights()
    wholes = {name: torch.cat([weights.tensors[f"{name}.weight"], torch.randn(2, H)]) for name in (EMBED, HEAD)}
    both = tuple(WholeProposal(source=name, weight=name, is_copy=True) for name in wholes)
    ran = run_proposal(tmp_path, Proposal(wholes=both), wholes, weights=weights)
    assert ran.extras.vocab_size == V + 2 and "vocabulary" in ran.extras.replaced
    for part, name in ((ran.extras.embedding, EMBED), (ran.extras.head, HEAD)):
        assert part is not None and part.rows is not None and part.rows.ids.tolist() == [V, V + 1]
        assert torch.equal(part.rows.values, wholes[name][V:])
    error = refused(
        RefusalCode.INCOMPLETE_PAIR, tmp_path, Proposal(wholes=both[:1]), {EMBED: wholes[EMBED]}, weights=weights
    )
    assert "the head has no rows for 2" in str(error)
    other = wholes | {HEAD: wholes[HEAD][:-1].clone()}
    refused(RefusalCode.SHAPE_MISMATCH, tmp_path, Proposal(wholes=both), other, weights=weights)


def test_a_smaller_vocabulary_is_said(tmp_path: Path) -> None:
    weights = FakeWeights()
    tensors = {"w": weights.tensors[f"{HEAD}.weight"][:-3].clone()}
    proposal = Proposal(wholes=(WholeProposal(source=HEAD, weight="w", is_copy=True),))
    ran = run_proposal(tmp_path, proposal, tensors, weights=weights)
    assert ran.extras.vocab_size == V - 3 and ran.extras.head is None and ran.extras


@pytest.mark.parametrize("is_transposed", [False, True])
def test_embedding_pairs_in_both_orders_and_on_a_tied_head(is_transposed: bool, tmp_path: Path) -> None:
    lora_a, lora_b = torch.randn(V, 2), torch.randn(2, H)
    stored = {"a": lora_a, "b": lora_b} if is_transposed else {"a": lora_a.T.contiguous(), "b": lora_b.T.contiguous()}
    embedding = EmbeddingProposal(
        source=EMBED, lora_a="a", lora_b="b", scale=3.0, lora_rank=2, is_transposed=is_transposed, on_tied_head=True
    )
    ran = run_proposal(tmp_path, Proposal(embeddings=(embedding,)), stored, base=tied())
    found = ran.extras.embedding
    assert found is not None and found.lora_a is not None and found.lora_b is not None
    assert torch.equal(found.lora_a, lora_a) and torch.equal(found.lora_b, lora_b * 3.0)
    head = ran.modules[HEAD]
    torch.testing.assert_close(head.lora_b.T @ head.lora_a, 3.0 * lora_a @ lora_b)
    assert len(run_proposal(tmp_path, Proposal(embeddings=(embedding,)), stored).modules) == 0


def test_weights_that_are_needed_are_not_done_without(tmp_path: Path) -> None:
    whole = {"w": torch.randn(V, H)}
    for proposal, tensors in (
        (Proposal(pairs=(pair(magnitude="m"),)), of_pair() | {"m": torch.ones(OUT)}),
        (Proposal(vectors=(VectorProposal(kind="bias", source=Q, input="b"),)), {"b": torch.ones(OUT)}),
        (Proposal(wholes=(WholeProposal(source=EMBED, weight="w"),)), whole),
    ):
        assert refused(RefusalCode.WRONG_BASE, tmp_path, proposal, tensors).feature == "base_weights"


NONFINITE: dict[str, tuple[Proposal, dict[str, Tensor]]] = {
    "norm": (Proposal(vectors=(VectorProposal(kind="norm", source=NORM, input="x"),)), {"x": torch.ones(H)}),
    "bias": (Proposal(vectors=(VectorProposal(kind="bias", source=Q, input="x"),)), {"x": torch.ones(OUT)}),
    "lora_bias": (Proposal(pairs=(pair(bias="x"),)), of_pair() | {"x": torch.ones(OUT)}),
    "ia3": (Proposal(vectors=(VectorProposal(kind="ia3", source=Q, input="x"),)), {"x": torch.ones(OUT, 1)}),
    "magnitude": (Proposal(pairs=(pair(magnitude="x"),)), of_pair() | {"x": torch.ones(OUT)}),
    "whole": (Proposal(wholes=(WholeProposal(source=EMBED, weight="x"),)), {"x": torch.ones(V, H)}),
    "tokens": (
        Proposal(tokens=(TokensProposal(source=EMBED, input="x", ids=(1,), is_only=True),)),
        {"x": torch.ones(1, H)},
    ),
    "embedding": (
        Proposal(embeddings=(EmbeddingProposal(source=EMBED, lora_a="x", lora_b="b", scale=1.0, lora_rank=1),)),
        {"x": torch.ones(1, V), "b": torch.ones(H, 1)},
    ),
    "fold": (
        Proposal(pairs=(pair(inputs=("x", "b"), fold=partial(doubled, by=1.0), lora_rank=1),)),
        {"x": torch.ones(1, H), "b": torch.ones(OUT, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NONFINITE)
def test_what_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    proposal, tensors = NONFINITE[name]
    run_proposal(tmp_path, proposal, tensors, weights=FakeWeights())
    bad = tensors["x"].clone()
    bad.view(-1)[-1] = value
    error = refused(RefusalCode.NONFINITE, tmp_path, proposal, tensors | {"x": bad}, weights=FakeWeights())
    assert error.tensor == "x"


def test_every_tensor_goes_to_one_place(tmp_path: Path) -> None:
    one, extra = Proposal(pairs=(pair(),)), {"x": torch.ones(3)}
    assert refused(RefusalCode.KEY_UNMATCHED, tmp_path, one, of_pair() | extra).tensor == "x"
    run_proposal(tmp_path, replace(one, dropped=("x",)), of_pair() | extra)
    twice = replace(one, dropped=(f"{Q}.A",))
    assert refused(RefusalCode.AMBIGUOUS_LAYOUT, tmp_path, twice, of_pair()).tensor == f"{Q}.A"
    with pytest.raises(ValueError, match="not there"):
        run_proposal(tmp_path, replace(one, dropped=("y",)), of_pair())


def test_two_owners_of_one_thing_are_refused(tmp_path: Path) -> None:
    for proposal, tensors in (
        (
            Proposal(pairs=(pair(), pair(inputs=("A", "B")))),
            of_pair() | {"A": torch.ones(2, H), "B": torch.ones(OUT, 2)},
        ),
        (
            Proposal(vectors=tuple(VectorProposal(kind="norm", source=NORM, input=name) for name in "ab")),
            {"a": torch.ones(H), "b": torch.ones(H)},
        ),
    ):
        refused(RefusalCode.AMBIGUOUS_LAYOUT, tmp_path, proposal, tensors)


UNPLACEABLE: dict[str, tuple[Proposal, dict[str, Tensor], RefusalCode]] = {
    "experts": (
        Proposal(
            experts=(
                ExpertProposal(source=Q, parameter="gate", inputs=("x",), form="fused", scale=1.0, lora_rank=1),
            )
        ),
        {"x": torch.ones(1)},
        RefusalCode.UNSUPPORTED,
    ),
    "pair of a norm": (
        Proposal(pairs=(pair(NORM),)),
        of_pair(NORM, out_features=H),
        RefusalCode.UNSUPPORTED,
    ),
    "norm of a linear": (
        Proposal(vectors=(VectorProposal(kind="norm", source=Q, input="x"),)),
        {"x": torch.ones(H)},
        RefusalCode.UNSUPPORTED,
    ),
    "whole linear": (
        Proposal(wholes=(WholeProposal(source=Q, weight="x"),)), {"x": torch.ones(OUT, H)}, RefusalCode.UNSUPPORTED
    ),
    "bias of none": (
        Proposal(vectors=(VectorProposal(kind="bias", source=K, input="x"),)),
        {"x": torch.ones(OUT)},
        RefusalCode.SHAPE_MISMATCH,
    ),
    "token twice": (
        Proposal(tokens=(TokensProposal(source=EMBED, input="x", ids=(1, 1), is_only=True),)),
        {"x": torch.ones(2, H)},
        RefusalCode.CORRUPT,
    ),
    "token past the vocabulary": (
        Proposal(tokens=(TokensProposal(source=EMBED, input="x", ids=(V,), is_only=True),)),
        {"x": torch.ones(1, H)},
        RefusalCode.SHAPE_MISMATCH,
    ),
    "fewer rows than tokens": (
        Proposal(tokens=(TokensProposal(source=EMBED, input="x", ids=(1, 2), is_only=True),)),
        {"x": torch.ones(1, H)},
        RefusalCode.SHAPE_MISMATCH,
    ),
    "invocation past the vocabulary": (
        Proposal(pairs=(pair(),), invocation_tokens=(3, V)), of_pair(), RefusalCode.SHAPE_MISMATCH
    ),
    "magnitude of another width": (
        Proposal(pairs=(pair(magnitude="x"),)), of_pair() | {"x": torch.ones(OUT + 1)}, RefusalCode.SHAPE_MISMATCH
    ),
    "doubles": (
        Proposal(wholes=(WholeProposal(source=EMBED, weight="x"),)),
        {"x": torch.ones(V, H, dtype=torch.float64)},
        RefusalCode.UNSUPPORTED,
    ),
    "a fold for another width": (
        Proposal(pairs=(pair(fold=partial(doubled, by=1.0), in_features=H + 1),)), of_pair(), RefusalCode.SHAPE_MISMATCH
    ),
    "a fold over the rank": (
        Proposal(pairs=(pair(fold=partial(doubled, by=1.0), lora_rank=65),)), of_pair(), RefusalCode.TOO_LARGE
    ),
    "a fold of another rank": (
        Proposal(pairs=(pair(fold=partial(doubled, by=1.0), stored_rank=2, declared_rank=3),)),
        of_pair(),
        RefusalCode.SHAPE_MISMATCH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPLACEABLE)
def test_what_has_no_place_is_refused_before_data_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposal, tensors, code = UNPLACEABLE[name]
    monkeypatch.setattr("adapters.run_plan.read_piece", None)
    error = refused(code, tmp_path, proposal, tensors, weights=FakeWeights())
    assert error.tensor is not None or error.feature is not None


def test_invocation_tokens_are_kept(tmp_path: Path) -> None:
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(),), invocation_tokens=(3, 1, 3)), of_pair())
    assert ran.extras.invocation_tokens == (3, 1, 3) and ran.extras


FUSED = BaseModules(
    "fused",
    {"l.qkv": LinearShape(H, 12)},
    fused={"l.qkv": (FusedPart("q", ((0, 2), (6, 8))), FusedPart("k", ((2, 4), (8, 10))), FusedPart("v", ((4, 6),)))},
)


def test_parts_of_a_fused_linear_are_one_pair_of_it(tmp_path: Path) -> None:
    tensors = of_pair("l.q", r=2, out_features=4) | of_pair("l.k", r=3, out_features=4)
    proposal = Proposal(pairs=(pair("l.q"), pair("l.k", r=3, scale=5.0, fold=partial(doubled, by=2.0))))
    ran = run_proposal(tmp_path, proposal, tensors, base=FUSED)
    assert list(ran.modules) == ["l.qkv"] and ran.modules["l.qkv"].lora_rank == 5
    weights, delta = ran.modules["l.qkv"], torch.zeros(12, H)
    delta[[0, 1, 6, 7]] = 2.0 * tensors["l.q.B"] @ tensors["l.q.A"]
    delta[[2, 3, 8, 9]] = 5.0 * tensors["l.k.B"] @ (2.0 * tensors["l.k.A"])
    torch.testing.assert_close(weights.lora_b.T @ weights.lora_a, delta)


def test_a_magnitude_of_a_part_is_for_its_rows_alone(tmp_path: Path) -> None:
    weight, magnitude = torch.randn(12, H), torch.rand(4) + 0.5
    weights = FakeWeights(tensors={"l.qkv.weight": weight})
    tensors = of_pair("l.q", out_features=4) | of_pair("l.k", out_features=4) | {"m": magnitude}
    ran = run_proposal(
        tmp_path,
        Proposal(pairs=(pair("l.q", magnitude="m"), pair("l.k"))),
        tensors,
        base=FUSED,
        weights=weights,
    )
    delta, gain, mine = torch.zeros(12, H), torch.ones(12), [0, 1, 6, 7]
    delta[mine] = 2.0 * tensors["l.q.B"] @ tensors["l.q.A"]
    gain[mine] = magnitude / (weight[mine] + delta[mine]).norm(dim=1)
    delta[[2, 3, 8, 9]] = 2.0 * tensors["l.k.B"] @ tensors["l.k.A"]
    torch.testing.assert_close(ran.extras.gains["l.qkv"], gain)
    found = ran.modules["l.qkv"]
    torch.testing.assert_close(found.lora_b.T @ found.lora_a, gain[:, None] * delta)


def test_biases_of_b_of_parts_are_one_of_the_whole(tmp_path: Path) -> None:
    biases = {"q": torch.randn(4), "k": torch.randn(4)}
    tensors = of_pair("l.q", out_features=4) | of_pair("l.k", out_features=4) | biases
    proposal = Proposal(pairs=(pair("l.q", bias="q"), pair("l.k", scale=5.0, bias="k")))
    ran = run_proposal(tmp_path, proposal, tensors, base=FUSED)
    wanted = torch.zeros(12)
    wanted[[0, 1, 6, 7]], wanted[[2, 3, 8, 9]] = 2.0 * biases["q"], 5.0 * biases["k"]
    torch.testing.assert_close(ran.extras.biases["l.qkv"], wanted)


APART = BaseModules(
    "apart", {"l.q_proj": LinearShape(H, 6), "l.k_proj": LinearShape(H, 2), "l.v_proj": LinearShape(H, 4)}
)


def test_a_linear_that_the_base_keeps_apart_is_cut_into_its_parts(tmp_path: Path) -> None:
    tensors = of_pair("l.qkv_proj", out_features=12) | {"m": torch.rand(12) + 0.5}
    weights = FakeWeights(
        tensors={f"{name}.weight": torch.randn(s.out_features, H) for name, s in APART.linears.items()}
    )
    proposal = Proposal(pairs=(pair("l.qkv_proj", magnitude="m"),))
    ran = run_proposal(tmp_path, proposal, tensors, base=APART, weights=weights)
    adapted = torch.cat([weights.tensors[f"{name}.weight"] for name in APART.linears])
    delta = 2.0 * tensors["l.qkv_proj.B"] @ tensors["l.qkv_proj.A"]
    gain = tensors["m"] / (adapted + delta).norm(dim=1)
    torch.testing.assert_close(torch.cat([ran.extras.gains[name] for name in APART.linears]), gain)
    found = torch.cat([ran.modules[name].lora_b.T @ ran.modules[name].lora_a for name in APART.linears])
    torch.testing.assert_close(found, gain[:, None] * delta)


def test_what_a_linear_that_is_apart_cannot_be(tmp_path: Path) -> None:
    for size in (11, 13):
        proposal, wrong = Proposal(pairs=(pair("l.qkv_proj"),)), of_pair("l.qkv_proj", out_features=size)
        refused(RefusalCode.SHAPE_MISMATCH, tmp_path, proposal, wrong, base=APART)
    twice = of_pair("l.qkv_proj", out_features=12) | of_pair("l.k_proj", out_features=2)
    proposal = Proposal(pairs=(pair("l.qkv_proj"), pair("l.k_proj")))
    refused(RefusalCode.AMBIGUOUS_LAYOUT, tmp_path, proposal, twice, base=APART)
    some = replace(APART, linears={name: shape for name, shape in APART.linears.items() if name != "l.v_proj"})
    proposal = Proposal(pairs=(pair("l.qkv_proj"),))
    refused(RefusalCode.KEY_UNMATCHED, tmp_path, proposal, of_pair("l.qkv_proj", out_features=8), base=some)


HEADS = BaseModules("llama", {"l.q_proj": LinearShape(H, 12)}, head_dims={"l.q_proj": 6})


def test_torchtunes_magnitudes_are_put_into_the_order_of_rows(tmp_path: Path) -> None:
    """Of a head of 6 rows torchtune holds 0 3 1 4 2 5."""
    tensors, weight = of_pair("l.q_proj", out_features=12) | {"m": torch.rand(12) + 0.5}, torch.randn(12, H)
    proposal = Proposal(pairs=(pair("l.q_proj", magnitude="m", is_interleaved=True),))
    weights = FakeWeights(tensors={"l.q_proj.weight": weight})
    ran = run_proposal(tmp_path, proposal, tensors, base=HEADS, weights=weights)
    order = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    norms = (weight + 2.0 * tensors["l.q_proj.B"] @ tensors["l.q_proj.A"]).norm(dim=1)
    torch.testing.assert_close(ran.extras.gains["l.q_proj"], tensors["m"][order] / norms)


@pytest.mark.parametrize(
    "base",
    [replace(HEADS, model_type="qwen2"), replace(HEADS, head_dims={}), replace(HEADS, head_dims={"l.q_proj": 3})],
)
def test_torchtunes_magnitudes_are_refused_where_their_order_is_unknown(tmp_path: Path, base: BaseModules) -> None:
    tensors = of_pair("l.q_proj", out_features=12) | {"m": torch.ones(12)}
    proposal = Proposal(pairs=(pair("l.q_proj", magnitude="m", is_interleaved=True),))
    error = refused(RefusalCode.AMBIGUOUS_LAYOUT, tmp_path, proposal, tensors, base=base, weights=FakeWeights())
    assert error.tensor == "m" and "torchtune" in str(error)


def test_what_a_part_of_a_fused_linear_cannot_be(tmp_path: Path) -> None:
    wide = of_pair("l.q", r=2, out_features=5)
    refused(RefusalCode.SHAPE_MISMATCH, tmp_path, Proposal(pairs=(pair("l.q"),)), wide, base=FUSED)
    for size in (3, 5, 12):
        dora = of_pair("l.q", out_features=4) | {"m": torch.ones(size)}
        proposal = Proposal(pairs=(pair("l.q", magnitude="m"),))
        refused(RefusalCode.SHAPE_MISMATCH, tmp_path, proposal, dora, base=FUSED, weights=FakeWeights())
    both = of_pair("l.q", r=40, out_features=4) | of_pair("l.k", r=40, out_features=4)
    proposal = Proposal(pairs=(pair("l.q", r=40), pair("l.k", r=40)))
    assert "r=80" in str(refused(RefusalCode.TOO_LARGE, tmp_path, proposal, both, base=FUSED))
    twice = of_pair("l.q", out_features=4) | of_pair("l.qkv", out_features=12)
    proposal = Proposal(pairs=(pair("l.q"), pair("l.qkv")))
    refused(RefusalCode.AMBIGUOUS_LAYOUT, tmp_path, proposal, twice, base=FUSED)


def test_a_pair_of_a_router_stands_under_its_name(tmp_path: Path) -> None:
    base = replace(BASE, routers={"model.gate": LinearShape(H, 4)})
    tensors = of_pair("model.gate", out_features=4) | of_pair()
    ran = run_proposal(tmp_path, Proposal(pairs=(pair(), pair("model.gate"))), tensors, base=base)
    assert set(ran.modules) == {Q, "model.gate"}
    assert torch.equal(ran.modules["model.gate"].lora_a, tensors["model.gate.A"])
