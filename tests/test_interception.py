"""The dispatcher: it sees every call form once, changes nothing, and lets nothing out of a hook."""

import ast
import copy
import gc
import math
import pickle
import threading
import types
import warnings
import weakref
from pathlib import Path

import loops
import numpy as np
import pytest
import torch
from loops import early_bound
from torch import nn
from torch.nn.utils import clip_grad

from normtune import interception, listening
from normtune.errors import NormtuneError
from normtune.recorder import NormRecorder


def train(watch, *, clip=lambda _: None, make=None, steps=loops.STEPS, model=None):
    """A plain loop: its model, true norms, and what `watch` returned."""
    model = loops.net() if model is None else model
    optimizer = make(model) if make else torch.optim.SGD(model.parameters(), lr=0.05)
    watched = watch(optimizer)
    true = []
    for x, y in loops.batches(steps):
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters()))
        clip(model)
        optimizer.step()
    return model, true, watched


def same(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)) for p, q in pairs)


def norms_of(recorder):
    recorder.close()
    return recorder.record.norms


# --- installation ----------------------------------------------------------------------------------


def test_installing_again_changes_nothing():
    """One dispatcher a process, never stacked (row 19)."""
    interception.install()
    cells = [fn.__closure__[0].cell_contents for fn in (early_bound, clip_grad.clip_grad_value_)]
    scaler = torch.amp.GradScaler.step
    interception.install()
    assert cells == [
        fn.__closure__[0].cell_contents for fn in (early_bound, clip_grad.clip_grad_value_)
    ]
    assert torch.amp.GradScaler.step is scaler


@pytest.mark.parametrize("name", ["clip_grad_norm_", "_clip_grads_with_norm_", "clip_grad_value_"])
def test_this_torch_builds_its_clip_functions_as_the_dispatcher_knows(name):
    """A new torch that is built differently fails here first (row 3)."""
    interception.install()
    function = getattr(clip_grad, name)
    cell = function.__closure__[function.__code__.co_freevars.index("func")]
    assert cell.cell_contents.__module__ == "normtune.clipping"


def test_the_step_hooks_are_imported_by_their_own_name():
    """As an attribute of torch.optim the module `optimizer` is not always there (row 42)."""
    assert interception.register_optimizer_step_pre_hook.__module__ == "torch.optim.optimizer"
    room = Path(interception.__file__).parent
    texts = [path.read_text(encoding="utf-8") for path in room.rglob("*.py")]
    used = [node for text in texts for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.optim.optimizer"]  # fmt: skip
    assert not used


def test_a_torch_that_is_built_differently_is_refused():
    """With a sentence instead of silence."""
    for function in (lambda parameters: parameters, len):
        with pytest.raises(NormtuneError, match="in a way that this normtune does not know"):
            interception._replace_wrapped(function, print)


def test_the_fast_names_stay_torchs():
    """Names, signatures and docstrings are what they were."""
    interception.install()
    assert torch.nn.utils.clip_grad_norm_ is clip_grad.clip_grad_norm_
    assert "max_norm" in torch.nn.utils.clip_grad_norm_.__doc__


# --- what the caller sees --------------------------------------------------------------------------

CALLS = {
    "a list": lambda m, c: early_bound(list(m.parameters()), c),
    "a generator": lambda m, c: early_bound(m.parameters(), c),
    "filter": lambda m, c: early_bound(filter(lambda p: p.requires_grad, m.parameters()), c),
    "one tensor": lambda m, c: early_bound(m[0].weight, c),
    "keywords": lambda m, c: early_bound(parameters=m.parameters(), max_norm=c, norm_type=2),
    "norm_type inf": lambda m, c: early_bound(m.parameters(), c, math.inf),
    "norm_type as text": lambda m, c: early_bound(m.parameters(), c, "inf"),
    "norm_type 1": lambda m, c: early_bound(m.parameters(), c, norm_type=1),
    "norm_type 0.5": lambda m, c: early_bound(m.parameters(), c, norm_type=0.5),
    "foreach": lambda m, c: early_bound(m.parameters(), c, foreach=True),
    "no foreach": lambda m, c: early_bound(m.parameters(), c, foreach=False),
    "a tensor as max_norm": lambda m, c: early_bound(m.parameters(), torch.tensor(c)),
    "an int as max_norm": lambda m, _: early_bound(m.parameters(), 1),
    "a numpy number": lambda m, c: early_bound(m.parameters(), np.float64(c)),
    "error_if_nonfinite": lambda m, c: early_bound(m.parameters(), c, error_if_nonfinite=True),
    "under no_grad": lambda m, c: torch.no_grad()(early_bound)(m.parameters(), c),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_form_of_the_call_does_what_it_did(call):
    """Gradients and returned norm are those without a recorder, bit for bit (rows 3, 52, 57)."""
    results = []
    for watched in (True, False):
        model = loops.net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        recorder = NormRecorder(optimizer) if watched else None
        x, y = loops.batches(1)[0]
        loops.loss_of(model, x, y).backward()
        total = call(model, loops.CLIP)
        results.append([total, *(p.grad for p in model.parameters())])
        if recorder:
            recorder.close()
    assert all(map(torch.equal, *results))
    assert results[0][0].dtype == results[1][0].dtype


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan, math.inf, 1e-30, 1e30, True])
def test_strange_limits_of_the_loop_do_what_they_did(max_norm):
    """0 zeroes, -1 flips, nan spoils, and the norm recorded is true all the same (row 50)."""

    def clip(model):
        early_bound(model.parameters(), max_norm)

    ours, true, recorder = train(NormRecorder, clip=clip)
    theirs, _, _ = train(lambda _: None, clip=clip)
    assert same(ours, theirs)
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.37, math.inf])
def test_non_finite_gradients_are_clipped_as_they_were(bad, max_norm):
    """A clip at inf turns all of them into nan, with us as without (rows 47, 48)."""
    results = []
    for watched in (True, False):
        model = loops.net()
        recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.1)) if watched else None
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[0].weight.grad[0, 0] = bad
        early_bound(model.parameters(), max_norm)
        results.append([p.grad for p in model.parameters()])
        if recorder:
            recorder.close()
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_imposed_inf_never_turns_gradients_into_nan():
    """To measure is not to clip at inf (row 47)."""
    model = loops.net()
    recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.1), max_norm=math.inf)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].weight.grad[0, 0] = math.inf
    early_bound(model.parameters(), 1.0)
    assert torch.equal(model[2].weight.grad, torch.ones(2, 8))
    recorder.close()


WRONG = {
    "no iterable": lambda _: early_bound(3, 1.0),
    "no number": lambda m: early_bound(m.parameters(), "one"),
    "no max_norm": lambda m: early_bound(m.parameters()),
    "unknown argument": lambda m: early_bound(m.parameters(), 1.0, p=2),
    "not finite": lambda m: early_bound(m.parameters(), 1.0, error_if_nonfinite=True),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_call_raises_what_it_raised(wrong):
    """A caller's mistake is torch's to explain (row 49)."""
    told = []
    for watched in (True, False):
        model = loops.net()
        recorder = NormRecorder(model) if watched else None
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            wrong(model)
        told.append((error.type, str(error.value).replace("spy_", "")))
        if recorder:
            recorder.close()
    assert told[0] == told[1]


def test_sparse_gradients_fail_in_the_loops_own_clip_as_they_did():
    """Torch has no clip for them, and a recorder gives it none (row 55)."""
    model = nn.Embedding(5, 2, sparse=True)
    with NormRecorder(torch.optim.SGD(model.parameters(), lr=0.1)):
        model(torch.tensor([1, 1])).sum().backward()
        with pytest.raises(NotImplementedError):
            early_bound(model.parameters(), 1.0)


def test_an_exhausted_generator_gets_zero_and_torchs_own_warning():
    """The call is passed on as it came (row 52)."""
    model = loops.net()
    recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.1))
    spent = model.parameters()
    list(spent)
    with pytest.warns(UserWarning, match="empty generator"):
        assert early_bound(spent, 1.0) == 0.0
    assert early_bound([], 1.0) == 0.0
    assert [f.kind for f in recorder.findings] == ["clip-nothing", "clip-nothing"]
    recorder.close()


def test_a_clip_on_no_gradient_is_no_norm_of_zero():
    """All gradients None: 0.0 for the caller, no row in the record (row 53)."""
    model = loops.net()
    recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.1))
    assert early_bound(model.parameters(), 1.0) == 0.0
    assert recorder.n_steps == 0
    assert recorder.findings[0].kind == "clip-without-gradients"
    recorder.close()


def test_the_returned_norm_may_be_changed_by_its_owner():
    """The record keeps its own copy (row 62)."""

    def clip(model):
        early_bound(model.parameters(), loops.CLIP).mul_(0.0)

    _, true, recorder = train(NormRecorder, clip=clip)
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_a_model_that_nobody_records_is_let_alone():
    """Another recorder in the process does not change what its clip calls do or cost."""
    other = NormRecorder(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    clip = CALLS["a generator"]
    model, _, _ = train(lambda _: None, clip=lambda m: clip(m, loops.CLIP))
    assert other.n_steps == 0
    assert not other.findings
    other.close()
    alone, _, _ = train(lambda _: None, clip=lambda m: clip(m, loops.CLIP))
    assert same(model, alone)


# --- steps -----------------------------------------------------------------------------------------


class Doubled(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Outer(torch.optim.Optimizer):
    """Steps an inner optimizer, as Lookahead and SAM do."""

    def __init__(self, parameters, lr):
        self.inner = torch.optim.SGD(parameters, lr=lr)
        super().__init__(self.inner.param_groups, {"lr": lr})

    def step(self, closure=None):
        self.inner.step()
        return self.inner.step(closure)


@pytest.mark.parametrize("kind", [Doubled, Outer])
def test_only_the_outermost_step_counts(kind):
    """Also where a plain SGD was built before, which doubles the hooks (row 15)."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    _, true, recorder = train(NormRecorder, make=lambda m: kind(m.parameters(), lr=0.01))
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_an_optimizer_that_never_called_its_parents_init_is_seen():
    """No torch hook exists there (rows 17, 17c)."""

    class Bare(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters), "lr": 0.05}]

        def zero_grad(self):
            for p in self.param_groups[0]["params"]:
                p.grad = None

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.05 * p.grad)

    _, true, recorder = train(NormRecorder, make=lambda m: Bare(m.parameters()))
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_a_step_that_is_only_an_attribute_is_seen():
    """A namespace with a function in it."""

    def make(model):
        parameters = list(model.parameters())

        @torch.no_grad()
        def step():
            for p in parameters:
                p.sub_(0.05 * p.grad)

        groups = [{"params": parameters, "lr": 0.05}]
        return types.SimpleNamespace(step=step, zero_grad=model.zero_grad, param_groups=groups)

    _, true, recorder = train(NormRecorder, make=make)
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_a_step_that_cannot_be_watched_is_refused():
    """One sentence that names the class."""

    class Sealed:
        __slots__ = ("param_groups",)

        def __getattr__(self, name):
            if name == "step":
                return lambda: None
            raise AttributeError(name)

    sealed = Sealed()
    sealed.param_groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    with pytest.raises(NormtuneError, match="steps of Sealed: its step is read-only"):
        NormRecorder(sealed)


class Plain:
    """No torch optimizer, but with its parts; module-level, so that it can be pickled."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.5}]

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.5 * p.grad)


@pytest.mark.parametrize("make", [Plain, lambda p: torch.optim.SGD(p, lr=0.5)])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])  # noqa: S301
def test_a_copy_of_a_watched_optimizer_steps_its_own_parameters(make, twin):
    """And is not watched; a learning-rate factor does not come along either."""
    parameter = nn.Parameter(torch.zeros(2))
    factor = {"lr_factor": 0.1} if make is not Plain else {}
    recorder = NormRecorder(make([parameter]), **factor)
    other = twin(recorder._optimizers[0])
    mine = other.param_groups[0]["params"][0]
    mine.grad = torch.ones(2)
    other.step()
    assert mine.tolist() == [-0.5, -0.5]
    assert parameter.tolist() == [0.0, 0.0]
    assert recorder.n_steps == 0
    recorder.close()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_of_a_watched_model_is_a_plain_model(twin):
    """Without hooks of the recorder's, with and without training behind it."""
    model, _, recorder = train(NormRecorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = twin(model)
    assert same(model, other)
    assert not any(p._post_accumulate_grad_hooks for p in other.parameters())
    recorder.close()


def test_a_step_that_raised_does_not_spoil_the_next():
    """A loop that catches an error of step() gets true norms from then on."""

    class Breaking(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0].get("breaks"):
                message = "out of memory"
                raise RuntimeError(message)
            return super().step(closure)

    model = loops.net()
    optimizer = Breaking(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer)
    true = []
    for i, (x, y) in enumerate(loops.batches()):
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        true.append(loops.true_norm(model.parameters()))
        early_bound(model.parameters(), loops.CLIP)
        optimizer.param_groups[0]["breaks"] = i == 4
        try:
            optimizer.step()
        except RuntimeError:
            assert i == 4
    np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_a_closure_gets_through_as_argument_and_as_keyword():
    """With its arguments and its result; a hook returns None or new arguments only (row 21)."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    recorder = NormRecorder(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert optimizer.step(closure=closure).item() == 0.0
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    np.testing.assert_allclose(recorder.record.norms[:2], [2.0, 0.0])
    recorder.close()


def test_hooks_of_others_still_run_and_see_what_they_saw():
    """A pre-hook and a post-hook of the user's own, beside the recorder's."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    with NormRecorder(optimizer):
        parameter.grad = torch.ones(1)
        optimizer.step()
    assert seen == ["pre", "post"]


# --- recorders beside each other -------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_recorders_may_be_closed_in_any_order(order):
    """Both see the true norms of all their steps, and afterwards nothing is left (row 19)."""
    both = []
    clip = CALLS["a generator"]

    def watch(optimizer):
        both.extend(NormRecorder(optimizer) for _ in range(2))

    model, first, _ = train(watch, clip=lambda m: clip(m, 0.1))
    both[order[0]].close()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    more = []
    for x, y in loops.batches(3):
        optimizer.zero_grad()
        loops.loss_of(model, x, y).backward()
        more.append(loops.true_norm(model.parameters()))
        clip(model, 0.1)
        optimizer.step()
    both[order[1]].close()
    np.testing.assert_allclose(both[order[0]].record.norms, first, rtol=1e-5)
    np.testing.assert_allclose(both[order[1]].record.norms, first + more, rtol=1e-5)


@pytest.mark.parametrize("clip", [lambda _: None, lambda m: early_bound(m.parameters(), 5.0)])
@pytest.mark.parametrize("limits", [(0.1, None), (None, 0.1), (0.1, math.inf), (math.inf, 0.1)])
def test_a_recorder_beside_one_that_clips_sees_the_unclipped_norm(clip, limits):
    """A user's own recorder inside a run of a search, made before or after it (row 19)."""
    made = []
    _, true, _ = train(
        lambda o: made.extend(NormRecorder(o, max_norm=limit) for limit in limits), clip=clip
    )
    for recorder in made:
        np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


@pytest.mark.parametrize("clip", [lambda _: None, lambda m: early_bound(m.parameters(), 0.37)])
@pytest.mark.parametrize("limits", [(0.5, 0.21), (0.1, 0.21), (math.inf, 0.21), (0.1, math.inf)])
def test_of_two_recorders_that_impose_the_younger_wins_and_both_see_true_norms(clip, limits):
    """Clipped once, with a clip call in the loop and without; the elder says that it does not."""
    made = []
    model, true, _ = train(
        lambda o: made.extend(NormRecorder(o, max_norm=limit) for limit in limits), clip=clip
    )
    last = limits[-1] if limits[-1] < math.inf else 1e30
    alone, _, _ = train(lambda _: None, clip=lambda m: early_bound(m.parameters(), last))
    assert same(model, alone)
    for recorder in made:
        np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)
    assert [[f.kind for f in r.findings] for r in made] == [["overruled"], []]


def test_the_elder_of_two_recorders_imposes_again_when_the_younger_is_closed():
    """Parameters are those of a loop that clips at one value and then at the other."""

    def half_and_half(first, second):
        return lambda m: early_bound(m.parameters(), first if len(seen) < 6 else second)

    seen = []
    clipped, _, _ = train(
        lambda _: None, clip=lambda m: (half_and_half(0.1, 0.21)(m), seen.append(1))
    )
    made, seen = [], []

    def close_the_younger(_):
        seen.append(1)
        if len(seen) == 7:
            made[1].close()

    imposed, _, _ = train(
        lambda o: made.extend(NormRecorder(o, max_norm=limit) for limit in (0.21, 0.1)),
        clip=close_the_younger,
    )
    assert same(imposed, clipped)


def test_a_thread_finds_the_recorder_of_its_own_parameters():
    """Four trainings at once, none mixed with another (row 41)."""
    results = {}

    def work(name):
        clip = loops.CLIP if name % 2 else 1e9
        model = loops.net()
        results[name] = train(
            NormRecorder, model=model, clip=lambda m: early_bound(m.parameters(), clip), steps=30
        )

    models = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in models:
        thread.start()
    for thread in models:
        thread.join()
    assert len(results) == 4
    for _, true, recorder in results.values():
        np.testing.assert_allclose(norms_of(recorder), true, rtol=1e-5)


def test_a_recorder_made_outside_sees_the_steps_of_a_thread():
    """Recorders are found through the parameters, not through the thread (row 41)."""
    model = loops.net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = NormRecorder(optimizer)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(lambda _: None, make=lambda _: optimizer, model=model))
    )
    thread.start()
    thread.join()
    np.testing.assert_allclose(norms_of(recorder), results[0][1], rtol=1e-5)


def test_nothing_keeps_a_model_alive():
    """Neither after close() nor when everything is simply forgotten."""
    for close in (True, False):
        model, _, recorder = train(NormRecorder, clip=lambda m: early_bound(m.parameters(), 1.0))
        gone = [weakref.ref(recorder), *(weakref.ref(p) for p in model.parameters())]
        if close:
            recorder.close()
        del model, recorder
        gc.collect()
        assert [r() for r in gone] == [None] * len(gone)
    assert not listening.owners


def test_gradients_are_not_kept_alive():
    """Not by a clip call, not by one that raised, not by a step (row 61)."""
    model = loops.net()
    recorder = NormRecorder(torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = loops.batches(1)[0]
    for bad in (False, True):
        (loops.loss_of(model, x, y) * (math.inf if bad else 1.0)).backward()
        gone = [weakref.ref(p.grad) for p in model.parameters()]
        try:
            early_bound(model.parameters(), 1.0, error_if_nonfinite=True)
        except RuntimeError:
            assert bad
        model.zero_grad()
        gc.collect()
        assert [r() for r in gone] == [None] * len(gone)
    recorder.close()


# --- nothing leaves a hook -------------------------------------------------------------------------


class Unmeasurable(torch.Tensor):
    """A gradient whose norm cannot be taken."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "norm" in getattr(func, "__name__", ""):
            message = "no norm here"
            raise ArithmeticError(message)
        return super().__torch_function__(func, types, args, kwargs or {})


def step_on_unmeasurable(**options):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.5, foreach=False)
    recorder = NormRecorder(optimizer, **options)
    parameter.grad = torch.ones(2).as_subclass(Unmeasurable)
    optimizer.step()
    return parameter, recorder


def test_no_exception_leaves_a_hook():
    """Recording stops with one warning and the reason; training goes on (row 20)."""
    with pytest.warns(UserWarning, match="stopped recording, training goes on") as caught:
        parameter, recorder = step_on_unmeasurable()
    assert parameter.tolist() == [0.5, 0.5]
    assert len(caught) == 1
    assert "no norm here" in str(caught[0].message)
    recorder.close()


def test_no_warning_leaves_a_hook_as_an_exception(capsys):
    """Where warnings are errors, as in many test suites, the sentence is printed (row 20)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parameter, recorder = step_on_unmeasurable()
    assert parameter.tolist() == [0.5, 0.5]
    assert "stopped recording" in capsys.readouterr().err
    recorder.close()


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"max_norm": math.inf}, {"lr_factor": 0.5}])
def test_a_run_whose_arm_cannot_be_applied_ends(options):
    """Where normtune imposes something, a failure is not passed over in silence."""
    with pytest.raises(ArithmeticError, match="no norm here"):
        step_on_unmeasurable(**options)


def test_an_object_that_only_looks_like_an_optimizer_is_let_alone():
    """Its step hooks run in our dispatcher too, and must not fail there (row 20)."""
    recorder = NormRecorder(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))

    class Strange(torch.optim.SGD):
        def step(self, closure=None):
            return closure or "stepped"

    optimizer = Strange([nn.Parameter(torch.ones(1))], lr=0.1)
    for groups in ([{}], [], None, [{"params": iter(())}], [None, 3]):
        optimizer.param_groups = groups
        assert optimizer.step() == "stepped"
    recorder.close()


# --- where a call stands ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["<string>", "<stdin>", "<ipython-input-3-0f1e>"])
def test_the_call_site_in_a_notebook_is_its_cell(file):
    """Code without a file of its own is the user's too."""
    cell = "def clip(model):\n    early_bound(model.parameters(), 1.0)\n"
    names = {"early_bound": early_bound}
    exec(compile(cell, file, "exec"), names)  # noqa: S102  as notebooks do
    _, _, recorder = train(NormRecorder, clip=names["clip"])
    recorder.close()
    assert recorder.record.series == f"{file}:2"


def test_the_call_site_is_the_users_line():
    """Also through the recorder's own method and through torch's decorators."""
    lines = []

    def watch(optimizer):
        lines.append(NormRecorder(optimizer))
        return lines[0]

    def clip(model):
        lines[0].clip_grad_norm_(model.parameters(), 1.0)

    train(watch, clip=clip)
    lines[0].close()
    number = clip.__code__.co_firstlineno + 1
    assert lines[0].record.series.endswith(f"test_interception.py:{number}")
