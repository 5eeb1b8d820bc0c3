"""Norms and clipping: torch's own numbers bit for bit, and fp64 where torch's are not true."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import true_norm
from torch import nn

from normtune import gradients

quick = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 10_000)
sizes = st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any)
p_norms = st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf])
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random_grads(sizes, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * scale).to(dtype) for n in sizes]


def parameters_with(grads):
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def bits(tensors):
    return [t.reshape(-1).view(torch.uint8).tolist() for t in tensors]


# --- the norm --------------------------------------------------------------------------------------


@quick
@given(sizes, seeds, p_norms, st.sampled_from(DTYPES), st.sampled_from([None, True, False]))
def test_the_norm_handed_back_to_the_loop_is_torchs(sizes, seed, p, dtype, foreach):
    """`torch_total_norm` takes a shorter way to the same bits as torch.nn.utils.get_total_norm."""
    grads = random_grads(sizes, seed, dtype)
    if p == math.inf:
        grads = [g for g in grads if g.numel()]  # torch has no inf norm of nothing
    ours = gradients.torch_total_norm(grads, p, False, foreach)
    theirs = nn.utils.get_total_norm(grads, p, foreach=foreach)
    assert ours.dtype == theirs.dtype
    assert bits([ours]) == bits([theirs])


@quick
@given(sizes, seeds, p_norms, st.sampled_from([torch.float32, torch.float64]))
def test_the_recorded_norm_equals_torchs_for_dense_gradients(sizes, seed, p, dtype):
    """Bit for bit in fp32 and fp64."""
    grads = [g for g in random_grads(sizes, seed, dtype) if g.numel()]
    theirs = nn.utils.get_total_norm(grads, p)
    assert bits([gradients.total_norm(grads, p)]) == bits([theirs])


@quick
@given(sizes, seeds, st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.integers(1, 5))
def test_the_norm_does_not_depend_on_how_parameters_are_grouped(sizes, seed, p, k):
    """The norm of the groups' norms is the norm of all (DESIGN: one vector)."""
    grads = [g for g in random_grads(sizes, seed) if g.numel()]
    parts = [grads[i::k] for i in range(k) if grads[i::k]]
    together = gradients.combined([gradients.total_norm(part, p) for part in parts], p)
    assert float(together) == pytest.approx(float(gradients.total_norm(grads, p)), rel=1e-5)


@quick
@given(sizes, seeds, st.sampled_from(DTYPES))
def test_half_precision_is_measured_in_fp32(sizes, seed, dtype):
    """Within fp32's accuracy of the norm of the same numbers in fp64 (rows 43, 44, 46)."""
    grads = random_grads(sizes, seed, dtype, scale=3.0)
    norm = gradients.total_norm(grads)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(norm) == pytest.approx(true_norm(parameters_with(grads)), rel=1e-5)


def test_fp16_norms_above_65504_are_finite():
    """Torch returns inf for 4 x 50000, and zeroes the gradients; 20000 small tensors too (row 43)."""
    grads = [torch.full((4,), 50000.0, dtype=torch.float16)]
    assert nn.utils.get_total_norm(grads).isinf()
    assert float(gradients.total_norm(grads)) == pytest.approx(2 * 49984.0, rel=1e-6)
    many = [torch.full((1,), 600.0, dtype=torch.float16)] * 20_000
    assert nn.utils.get_total_norm(many).isinf()
    assert float(gradients.total_norm(many)) == pytest.approx(600 * math.sqrt(20_000), rel=1e-5)


def test_bf16_norms_keep_their_digits():
    """300 draws give 300 norms, where torch's bf16 gives about ten (row 44)."""
    draws = [random_grads([1000], seed, torch.bfloat16) for seed in range(300)]
    assert len({float(gradients.total_norm(g)) for g in draws}) > 290
    assert len({float(nn.utils.get_total_norm(g)) for g in draws}) < 30


@pytest.mark.parametrize("size", [1e20, 1e30, 1e-25, 1e-30, 1e-44])
def test_fp32_norms_leave_neither_end_of_their_range(size):
    """Torch gives inf or 0 where only the squares leave fp32's range (row 45)."""
    grads = [torch.full((7,), size), torch.full((3,), size)]
    assert float(gradients.total_norm(grads)) == pytest.approx(
        true_norm(parameters_with(grads)), rel=1e-6
    )


def test_large_tensors_are_within_a_thousandth_of_fp64():
    """fp32 sums of many elements drift a little on the CPU (row 46)."""
    grads = random_grads([3_000_000], 0, scale=1e-3)
    assert float(gradients.total_norm(grads)) == pytest.approx(
        true_norm(parameters_with(grads)), rel=1e-3
    )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_gradients_give_a_non_finite_norm(bad):
    """And are left as they are: measuring never writes (rows 47, 48)."""
    grads = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    norm = float(gradients.total_norm(grads))
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf
    assert grads[1].tolist() == [2.0]
    assert grads[0][0].item() == 1.0


def test_mixed_dtypes_are_one_vector():
    """fp16, bf16, fp32 and fp64 in one set, also where the fp16 part overflows (row 60)."""
    grads = [torch.full((4,), 50000.0).to(d) for d in DTYPES]
    expected = true_norm(parameters_with(grads))
    assert float(gradients.total_norm(grads)) == pytest.approx(expected, rel=1e-6)
    assert nn.utils.get_total_norm(grads).isinf()


def test_complex_gradients_count_by_their_absolute_value():
    """|3 + 4i| is 5, beside real ones (row 56)."""
    grads = [torch.tensor([3 + 4j]), torch.tensor([12.0])]
    assert float(gradients.total_norm(grads)) == 13.0
    assert float(gradients.total_norm(grads[:1], math.inf)) == 5.0
    assert float(gradients.total_norm([torch.tensor([3e30 + 4e30j])])) == pytest.approx(5e30)


def test_sparse_gradients_are_summed_up_first_in_a_copy():
    """Two entries of one row count as their sum; the gradient stays uncoalesced (row 55)."""
    indices, values = torch.tensor([[0, 0, 2]]), torch.tensor([1.0, 2.0, 4.0])
    grad = torch.sparse_coo_tensor(indices, values, (5,), check_invariants=True)
    assert float(gradients.total_norm([grad])) == 5.0
    assert not grad.is_coalesced()
    assert float(gradients.total_norm([grad, torch.tensor([12.0])])) == 13.0


def test_no_gradients_give_zero_and_empty_tensors_count_nothing():
    """0.0 from nothing is told apart by its caller (row 53)."""
    assert float(gradients.total_norm([])) == 0.0
    assert float(gradients.total_norm([torch.empty(0), torch.tensor([3.0])])) == 3.0
    assert gradients.norms_of_each([]) == []


def test_a_norm_keeps_no_graph_alive():
    """Gradients of create_graph=True can be freed although their norm is kept (row 61)."""
    x = nn.Parameter(torch.ones(3))
    (grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    assert grad.requires_grad
    kept = [gradients.total_norm([grad]), *gradients.norms_of_each([grad])]
    kept.append(gradients.torch_total_norm([grad]))
    assert not any(norm.requires_grad or norm.grad_fn for norm in kept)
    gone = weakref.ref(grad)
    del grad
    gc.collect()
    assert gone() is None


@quick
@given(sizes, seeds, p_norms)
def test_each_norm_is_torchs_norm_of_that_gradient(sizes, seed, p):
    """What groups= records."""
    grads = [g for g in random_grads(sizes, seed) if g.numel()]
    ours = gradients.norms_of_each(grads, p)
    assert bits(ours) == bits([torch.linalg.vector_norm(g, p) for g in grads])


# --- clipping --------------------------------------------------------------------------------------

limits = st.one_of(
    st.floats(1e-6, 1e4), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e-30, 1e30])
)


@quick
@given(sizes, seeds, limits, st.sampled_from([torch.float32, torch.float64, torch.float16]))
def test_clips_as_torch_does(sizes, seed, max_norm, dtype):
    """The gradients of clip_grad_norm_, bit for bit, for sensible limits and others (row 50)."""
    ours = parameters_with(random_grads(sizes, seed, dtype))
    theirs = parameters_with(random_grads(sizes, seed, dtype))
    norm = gradients.torch_total_norm([p.grad for p in ours])
    gradients.clip_([p.grad for p in ours], max_norm, norm)
    nn.utils.clip_grad_norm_(theirs, max_norm)
    assert bits([p.grad for p in ours]) == bits([p.grad for p in theirs])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clips_non_finite_gradients_as_torch_does(bad):
    """Nan where torch makes nan, zero where it makes zero (row 48)."""
    grads = [torch.tensor([1.0, bad]), torch.tensor([2.0])]
    ours, theirs = parameters_with(grads), parameters_with(grads)
    norm = gradients.torch_total_norm([p.grad for p in ours])
    gradients.clip_([p.grad for p in ours], 1.0, norm)
    nn.utils.clip_grad_norm_(theirs, 1.0)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.grad, b.grad)


@quick
@given(sizes, seeds, st.floats(0.01, 1.0), st.floats(1e-3, 1e3))
def test_after_clipping_the_norm_is_the_limit(sizes, seed, share, scale):
    """Where the norm was above it; else nothing changed."""
    grads = random_grads(sizes, seed, scale=scale)
    norm = gradients.total_norm(grads)
    max_norm = share * float(norm)
    gradients.clip_(grads, max_norm, norm)
    # The 1e-6 in torch's coefficient is felt where the norm itself is small.
    expected = max_norm * float(norm) / (float(norm) + 1e-6)
    assert float(gradients.total_norm(grads)) == pytest.approx(expected, rel=1e-4)


@quick
@given(sizes, seeds, st.floats(1e-3, 1e3))
def test_clipping_the_clipped_changes_nothing(sizes, seed, max_norm):
    """Once within the limit, a second clip at a hair above it multiplies by exactly 1.0."""
    grads = random_grads(sizes, seed)
    gradients.clip_(grads, max_norm, gradients.total_norm(grads))
    before = bits(grads)
    changed = gradients.clip_(grads, max_norm * 1.0001 + 2e-6, gradients.total_norm(grads))
    assert changed is False
    assert bits(grads) == before


@quick
@given(sizes, seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_twice_is_clipping_at_the_lower_limit(sizes, seed, a, b):
    """The order of two limits does not matter."""
    one, two = random_grads(sizes, seed), random_grads(sizes, seed)
    for limit in (a, b):
        gradients.clip_(one, limit, gradients.total_norm(one))
    gradients.clip_(two, min(a, b), gradients.total_norm(two))
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_norm", [5.0, 5.000001, 5.0000011, 5.00001])
def test_a_norm_equal_to_the_limit_is_scaled_as_torch_scales_it(max_norm):
    """Torch's 1e-6: at exactly the norm the factor is 0.9999998, not 1 (row 51)."""
    ours = parameters_with([torch.tensor([3.0, 4.0])])
    theirs = parameters_with([torch.tensor([3.0, 4.0])])
    scaled = gradients.clip_([ours[0].grad], max_norm, torch.tensor(5.0))
    nn.utils.clip_grad_norm_(theirs, max_norm)
    assert bits([ours[0].grad]) == bits([theirs[0].grad])
    assert scaled is (gradients.coefficient(max_norm, torch.tensor(5.0)).item() < 1.0)


# --- what belongs to what --------------------------------------------------------------------------


def test_parameters_are_found_in_optimizers_modules_and_lists():
    """Each once, in order."""
    model = nn.Linear(2, 2)
    expected = list(map(id, model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shared = nn.ModuleList([model, model])
    for target in (model, optimizer, model.parameters(), [*model.parameters()] * 2, shared):
        assert list(map(id, gradients.parameters_of(target))) == expected


def test_wrappers_are_unwrapped_to_the_optimizer():
    """Accelerate's prepared optimizer never called Optimizer.__init__ (row 17c)."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)

    class Holder:
        optimizer = inner
        param_groups = inner.param_groups

    assert gradients.unwrapped(inner) is inner
    assert gradients.unwrapped(Holder()) is inner
    assert gradients.unwrapped(Wrapper(inner)) is inner
