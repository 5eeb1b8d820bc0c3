"""Real trainings of each framework, with its callback: the norms are those of backward()."""

import inspect
import logging
import math
import warnings

import numpy as np
import pytest
import torch
from frameworks_table import holds
from loops import true_norm
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normtune.integrations.hooks import NormHooks
from normtune.records import SCHEDULE, NormRecord

# The frameworks' own warnings (few workers, deprecated names) are none of ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

STEPS = 12
CLIP = 0.37


@pytest.fixture(params=["lightning", "pytorch_lightning"], scope="module")
def package(request):
    """Both names that Lightning goes by: the package, and its callback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = {"lightning": "lightning.pytorch"}.get(request.param, request.param)
        reason = f"needs {request.param}"
        pl = pytest.importorskip(name, reason=reason)
        rooms = pytest.importorskip(f"normtune.integrations.{request.param}", reason=reason)
    logging.getLogger(name).setLevel(logging.ERROR)
    return pl, rooms.NormCallback


def whole(trainer):
    """Lightning before 2.6 loads whole checkpoints without being asked."""
    known = inspect.signature(trainer.fit).parameters
    return {"weights_only": False} if "weights_only" in known else {}


def batches(n=STEPS):
    x = torch.randn(4 * n, 6, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def module(pl, *, manual, fused=False):
    """A module that notes its true norms right after each backward()."""

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
            self.automatic_optimization = not manual
            self.norms = []

        def training_step(self, batch, _):
            x, y = batch
            loss = ((self.net(x) - y) ** 2).mean()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=CLIP)
                optimizer.step()
            return loss

        def on_after_backward(self):
            self.norms.append(true_norm(self.parameters()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=fused)

    return Net()


def fit(package, *callbacks, manual=False, fused=False, n=STEPS, **options):
    pl, _ = package
    model = module(pl, manual=manual, fused=fused)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(model, batches(n))
    return model, trainer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


KINDS = {
    "automatic": {"gradient_clip_val": CLIP},
    "automatic, no clipping": {},
    "manual": {"manual": True},
    "accumulation": {"gradient_clip_val": CLIP, "accumulate_grad_batches": 3, "n": 24},
    "value clip": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_gives_the_norms_before_clipping_and_learns_the_same(kind, package):
    """One norm a step, of the whole sum under accumulation; the parameters are bit-identical."""
    callback = package[1]()
    model, _ = fit(package, callback, **KINDS[kind])
    every = KINDS[kind].get("accumulate_grad_batches", 1)
    np.testing.assert_allclose(
        callback.recorder.record.norms, model.norms[every - 1 :: every], rtol=1e-5
    )
    name = package[0].__name__.partition(".")[0]
    holds(f"{name}, {kind}", callback.recorder.record.norms, model.norms[every - 1 :: every])
    schedule = {} if kind == "manual" else {SCHEDULE: len(callback.recorder.record)}
    assert callback.recorder.record.metadata.get("metadata", {}) == schedule
    findings = {finding.kind for finding in callback.recorder.findings}
    assert findings == ({"clip-by-value"} if kind == "value clip" else set())
    assert same(model, fit(package, **KINDS[kind])[0])


SCALE = 1024.0


def amp(package):
    """Mixed precision with a GradScaler, on the CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return package[0].plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)


def test_lightning_with_amp_and_a_fused_optimizer_refuses_to_clip_at_its_first_step(package):
    """Its own error ends the training before a step is recorded, as it does without normtune."""
    callback = package[1]()
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(package, callback, fused=True, gradient_clip_val=CLIP, plugins=[amp(package)])
    assert callback.recorder.n_steps == 0


def test_what_lightning_refuses_with_amp_and_a_fused_optimizer_an_imposed_max_norm_does(package):
    """True norms under the scale, and the clipped training of an optimizer that is not fused."""
    callback = package[1](max_norm=CLIP)
    model, _ = fit(package, callback, fused=True, plugins=[amp(package)])
    norms = np.array(model.norms) / SCALE
    np.testing.assert_allclose(callback.recorder.record.norms, norms, rtol=1e-5)
    plain, _ = fit(package, gradient_clip_val=CLIP, plugins=[amp(package)])
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lightning_takes_an_imposed_max_norm(package):
    """The parameters are those of a Trainer that was given this value itself."""
    imposed, _ = fit(package, package[1](max_norm=0.21), gradient_clip_val=CLIP)
    asked, _ = fit(package, gradient_clip_val=0.21)
    assert same(imposed, asked)


def test_a_lightning_training_that_raises_keeps_its_record(package, tmp_path):
    """What was recorded until then is in the file."""
    pl, callback_class = package

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                raise OSError

    with pytest.raises(OSError):
        fit(package, callback_class(tmp_path / "run.norms.jsonl"), Stop())
    assert len(NormRecord.load(tmp_path / "run.norms.jsonl")) == 5


def test_a_resumed_lightning_training_continues_its_record(package, tmp_path):
    """Steps count on from the checkpoint, in one chain of attempts."""
    pl, callback_class = package
    path = tmp_path / "run.norms.jsonl"
    _, trainer = fit(package, callback_class(path), max_steps=8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    model = module(pl, manual=False)
    again = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback_class(path)],
    )  # fmt: skip
    again.fit(model, batches(), ckpt_path=tmp_path / "half.ckpt", **whole(again))
    record = NormRecord.load(path)
    assert record.steps[0] == 1
    assert len(record) == 8 + len(model.norms)
    np.testing.assert_allclose(record.norms[8:], model.norms, rtol=1e-5)


def test_suggest_before_any_training_says_when_to_call_it():
    """The callback has no recorder yet."""
    with pytest.raises(ValueError, match=r"after trainer\.fit"):
        NormHooks().suggest()


# --- Hugging Face Trainer ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    """The library without its network."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        library = pytest.importorskip("transformers", reason="needs transformers")
        pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
        yield library


def trained(transformers, folder, callback=None, **options):
    """A tiny GPT-2 on random tokens, and the norms that the Trainer itself logged."""
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    tokens = torch.randint(0, 50, (80, 12))
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        **{"max_steps": STEPS, **options},
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[callback] if callback else [],
    )
    trainer.train()
    logged = [float(x["grad_norm"]) for x in trainer.state.log_history if "grad_norm" in x]
    return trainer.model, logged


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.3}, {"max_grad_norm": 0.3, "gradient_accumulation_steps": 3}],
    ids=["clip", "accumulation"],
)
def test_the_trainer_callback_gives_every_norm_that_the_trainer_knows(
    options, transformers, tmp_path
):
    """The Trainer logs them before clipping, here at each step, and learns the same."""
    from normtune.integrations.transformers import NormCallback

    callback = NormCallback()
    model, logged = trained(transformers, tmp_path, callback, **options)
    record = callback.recorder.record
    np.testing.assert_allclose(record.norms, logged, rtol=1e-4)
    kind = "accumulation" if "gradient_accumulation_steps" in options else "clip"
    holds(f"Hugging Face Trainer, {kind}", record.norms, logged)
    assert record.current == 0.3
    assert callback.recorder.findings == ()
    assert record.metadata["metadata"] == {SCHEDULE: len(record)}
    assert same(model, trained(transformers, tmp_path, **options)[0])


def test_the_trainer_takes_an_imposed_max_norm_and_none_at_all(transformers, tmp_path):
    """0.21 in place of its 0.3 is its own 0.21; inf is a max_norm that never binds."""
    from normtune.integrations.transformers import NormCallback

    for imposed, asked in ((0.21, 0.21), (math.inf, 1e9)):
        model, _ = trained(
            transformers, tmp_path, NormCallback(max_norm=imposed), max_grad_norm=0.3
        )
        assert same(model, trained(transformers, tmp_path, max_grad_norm=asked)[0])


# --- Accelerate --------------------------------------------------------------------------------


def accelerated(tmp_path, *, sound):
    """Accumulation over three batches; an unsound loop clips after each of them."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    from normtune.integrations.accelerate import record

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(36))
    recorder = record(accelerator, optimizer, tmp_path / "run.norms.jsonl")
    true = []
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(((model(x) - y) ** 2).mean())
            if accelerator.sync_gradients:
                true.append(true_norm(model.parameters()))
            if accelerator.sync_gradients or not sound:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator, recorder, true


def test_an_accelerate_loop_gives_the_norm_of_each_accumulated_sum(tmp_path):
    """The prepared optimizer has no hooks of its own; the one inside has."""
    _, recorder, true = accelerated(tmp_path, sound=True)
    np.testing.assert_allclose(recorder.record.norms, true, rtol=1e-5)
    holds("Accelerate, prepared optimizer, accumulation", recorder.record.norms, true)
    assert recorder.record.metadata["metadata"] == {"gradient_accumulation_steps": 3}
    assert recorder.findings == ()


def test_an_accelerate_loop_that_clips_in_mid_accumulation_is_found(tmp_path):
    """Without `if accelerator.sync_gradients` parts of the sum are clipped."""
    _, recorder, _ = accelerated(tmp_path, sound=False)
    assert [f.kind for f in recorder.findings if f.blocks] == ["clip-in-accumulation"]


def test_an_accelerate_checkpoint_holds_the_place_of_the_record(tmp_path):
    """After load_state the steps count on."""
    accelerator, recorder, true = accelerated(tmp_path, sound=True)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.load_state(str(tmp_path / "state"))
    recorder.record_norm(1.0)
    recorder.close()
    record = NormRecord.load(tmp_path / "run.norms.jsonl")
    assert len(record) == len(true)
    assert recorder.n_steps == len(true) + 1
