"""What the operators have in common: the self-test, launching, tuning tables."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixart_rt.kernels import attention_tiles, catalog, launch, ln_modulate, tuning


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """Nothing refused, nothing remembered, and an empty user cache."""
    monkeypatch.setattr(launch, "_refused", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    catalog.self_test.cache_clear()
    launch.forget_tables()
    yield
    catalog.self_test.cache_clear()
    launch.forget_tables()


def pretend(monkeypatch, *operators, configurations=None):
    """These are all operators, and production shapes select these configurations."""
    monkeypatch.setattr(catalog, "OPERATORS", operators)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    if configurations is not None:
        monkeypatch.setattr(catalog, "production_configurations", lambda *_: configurations)


# Weights of keys past the image may overflow float16; they reach only rows that are not stored.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("operator", catalog.OPERATORS, ids=lambda each: each.name)
def test_kernels_agree_with_their_references(operator, device):
    """What the self-test does on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    assert catalog.worst_error(operator, device, dtype, seed=3) <= 1


def test_the_self_test_refuses_a_kernel_that_differs(clean, monkeypatch, device):
    wrong = launch.Operator(
        "wrong", launch.SM70, lambda x: x + 1, lambda x: x + 2,
        lambda device, dtype, seed: (torch.ones(3, device=device, dtype=dtype),), trains=False,
    )  # fmt: skip
    pretend(monkeypatch, wrong)
    with pytest.warns(RuntimeWarning, match="wrong is not used on a GPU in float16"):
        assert catalog.self_test(device, torch.float16, ("wrong",)) == ("wrong",)
    assert list(launch.refused()) == [("wrong", device.index or 0, torch.float16)]
    (line,) = launch.refused_lines()
    assert line.startswith("wrong in float16: its error is ")


def test_a_kernel_is_refused_in_the_dtype_that_was_tested(clean, monkeypatch):
    """float16 may overflow or spill where bfloat16 does neither."""
    monkeypatch.setattr(launch, "_capability", lambda index: (9, 0))
    launch.refuse("op", torch.device("cuda:1"), torch.float16, "it differs")
    with FakeTensorMode():
        half, wide = (torch.empty(3, device="cuda:1", dtype=dtype)
                      for dtype in (torch.float16, torch.float32))  # fmt: skip
        assert not launch.runs_triton("op", half, launch.SM70)
        assert not launch.runs_triton("op", wide, launch.SM70, torch.float16), "autocast"
        assert launch.runs_triton("op", wide, launch.SM70, torch.bfloat16, None)
        assert launch.runs_triton("op", half.bfloat16(), launch.SM70)
        assert launch.runs_triton("other", half, launch.SM70)
        assert launch.runs_triton("op", torch.empty_like(half, device="cuda:0"), launch.SM70)


@pytest.mark.parametrize("operator", catalog.OPERATORS, ids=lambda each: each.name)
def test_operators_ask_with_the_dtype_that_the_self_test_refuses(operator, device, monkeypatch):
    """In the forward and the backward, whatever other dtypes their tensors have."""
    asked = []

    def refused(name, tensor, least, *others):
        asked.append((name, {tensor.dtype, *others}))
        return False

    for file in (*catalog.FILES, attention_tiles):
        monkeypatch.setattr(file, "runs_triton", refused, raising=False)
    for dtype in operator.dtypes:
        asked.clear()
        assert catalog.worst_error(operator, device, dtype, 0) <= 1
        mine = [dtypes for name, dtypes in asked if name == operator.name]
        assert mine and all(dtype in dtypes for dtypes in mine), asked


def test_the_self_test_refuses_a_kernel_that_fails(clean, monkeypatch, device):
    def fail(*_):
        raise RuntimeError("ptxas fatal\nmore")

    broken = launch.Operator("broken", launch.SM70, fail, fail, lambda *_: ())
    pretend(monkeypatch, broken)
    with pytest.warns(RuntimeWarning, match="ptxas fatal; PyTorch"):
        assert catalog.self_test(device, torch.float16, ("broken",)) == ("broken",)


def test_a_kernel_that_does_not_fit_the_gpu_is_refused_with_its_configuration(
    clean, monkeypatch, device
):
    """OutOfResources of a configuration that only production shapes select."""
    tried = []

    def run(x):
        rows = launch.config("large", x, (len(x),), {"ROWS": 1})["ROWS"]
        tried.append(rows)
        if rows == 4:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return x + 1

    large = launch.Operator(
        "large", launch.SM70, run, lambda x: x + 1,
        lambda device, dtype, seed: (torch.ones(3, device=device, dtype=dtype),), trains=False,
        production=lambda device, dtype, seed: [(torch.ones(5, device=device, dtype=dtype),)],
    )  # fmt: skip
    pretend(monkeypatch, large, configurations={"large": [{"ROWS": 1}, {"ROWS": 4}]})
    with pytest.warns(RuntimeWarning, match=r"shared memory.*\(large: ROWS=4\)"):
        assert catalog.self_test(device, torch.float16, ("large",)) == ("large",)
    assert tried == [1, 1, 4]  # production widths and the example, then the other configuration


def test_inside_inference_mode_training_kernels_are_tested(clean, monkeypatch, device, recwarn):
    """A pipeline loads inside inference mode, whose tensors cannot require gradients."""
    ln = (each for each in catalog.OPERATORS if each.name == "ln_modulate")
    pretend(monkeypatch, *ln, configurations={})
    with torch.inference_mode():
        assert catalog.self_test(device, torch.float16, training=True) == ()
    assert not launch.refused()


def test_backward_kernels_are_compiled_only_where_training_asks(clean, monkeypatch, device):
    launched = set()
    real = launch.launch

    def note(kernel, *args, **kwargs):
        launched.add(kernel.__name__)
        real(kernel, *args, **kwargs)

    for file in catalog.FILES:
        monkeypatch.setattr(file, "launch", note, raising=False)
    ln = (each for each in catalog.OPERATORS if each.name == "ln_modulate")
    pretend(monkeypatch, *ln, configurations={})
    catalog.self_test(device, torch.float16)
    assert launched == {"_ln_modulate_kernel"}
    catalog.self_test(device, torch.float16, training=True)
    assert launched == {"_ln_modulate_kernel", "_ln_modulate_backward_kernel"}


def test_the_self_test_launches_what_production_shapes_select():
    """Each table that an operator names is asked at production shapes, in every dtype it has."""
    for dtype in (torch.float16, torch.bfloat16):
        with launch.record((9, 0)) as recorded, torch.device("meta"):
            for file in catalog.FILES:
                file.compile_example(dtype, 2, 4096)
        named = {table for each in catalog.OPERATORS for table in each.tables or (each.name,)}
        assert recorded.configurations.keys() <= named
    configurations = catalog.production_configurations(torch.device("cpu"), torch.bfloat16)
    assert {"BLOCK_M", "num_warps"} <= configurations["attention"][0].keys()
    assert len(configurations["linear_gate_residual"]) > 1  # 256 px has its own tiles


def test_the_self_test_asks_for_every_operator_once():
    groups = (*catalog.MODEL, *catalog.FP8, *catalog.VAE)
    assert sorted(groups) == sorted(each.name for each in catalog.OPERATORS)


def test_nan_is_an_error(device):
    nan = torch.full((3,), torch.nan, device=device)
    operator = launch.Operator(
        "nan", launch.SM70, lambda: nan, lambda: torch.ones(3), lambda *_: (), trains=False
    )
    error = catalog.worst_error(operator, torch.device("cpu"), torch.float32, 0)
    assert not error <= 1


def test_a_wrong_gradient_is_an_error(device):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return dy

    operator = launch.Operator(
        "gradient", launch.SM70, Wrong.apply, lambda x: 2 * x, lambda *_: (torch.ones(3),)
    )
    assert catalog.worst_error(operator, device, torch.float32, 0) > 1


def test_a_launch_is_recorded_and_not_run(device):
    x = torch.randn(1, 5, 72, device=device)
    table, shared = torch.randn(6, 72, device=device), torch.randn(1, 6, 72, device=device)
    with launch.record((8, 0)) as recorded:
        y, *_ = ln_modulate.ln_modulate_triton(x, table, shared, 0)
        assert launch.capability(x) == (8, 0)
    assert [each.kernel for each in recorded] == [ln_modulate._ln_modulate_kernel]
    assert recorded[0].kwargs["D"] == 72
    assert y.isnan().all()  # not written: fresh memory is poisoned in these tests


def subject_of(times, wrong=(), broken=()):
    """A subject whose time is that of its ROWS; some are wrong, some do not run."""

    def make(shape, device, dtype):
        def call():
            rows = launch.config("subject", torch.empty(0), shape, {"ROWS": 1})["ROWS"]
            call.rows = rows
            if rows in broken:
                raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
            return torch.full((3,), 7.0 if rows in wrong else 5.0)

        return call

    def timer(call):
        call()
        return times[call.rows]

    grid = tuning.grid(ROWS=tuple(rows for rows in times if rows != 1))
    return tuning.Subject("subject", grid, lambda B, N: [(B, N)], make), timer


def tune(subjects, device, **more):
    return tuning.tune(
        device, torch.float16, shapes=[(2, 256), (2, 1024)], subjects=subjects,
        **{"contests": (), **more},
    )  # fmt: skip


def test_tuning_finds_the_fastest_and_ignores_wrong_results(device):
    subject, timer = subject_of({1: 3.0, 2: 1.0, 4: 2.0, 8: 0.5}, wrong=(8,))
    table = tune([subject], device, timer=timer)
    found = {"2x256": {"ROWS": 2}, "2x1024": {"ROWS": 2}}
    assert table["operators"] == {"subject": {"float16": found}}
    assert table["not_tried"] == []


def test_tuning_survives_what_does_not_fit(device):
    """Also where that is the default: the first candidate that runs is what others agree with."""
    subject, timer = subject_of({1: 3.0, 2: 1.0, 4: 2.0}, broken=(1, 2))
    lines = []
    table = tune([subject], device, timer=timer, report=lines.append)
    assert table["operators"]["subject"]["float16"]["2x256"] == {"ROWS": 4}
    assert "default does not run" in lines[0]
    subject, timer = subject_of({1: 3.0, 2: 1.0}, broken=(1, 2))
    assert tune([subject], device, timer=timer)["operators"] == {}


def test_tuning_does_not_tune_what_the_self_test_refused(clean, device):
    subject, timer = subject_of({1: 3.0, 2: 1.0})
    launch.refuse("subject", device, torch.bfloat16, "it differs")
    assert tune([subject], device, timer=timer)["operators"], "float16 is tuned, and agrees"
    launch.refuse("subject", device, torch.float16, "it differs")
    lines = []
    assert tune([subject], device, timer=timer, report=lines.append)["operators"] == {}
    assert len(lines) == 2 and "refused" in lines[0]


def test_tuning_ends_in_time_and_lists_what_was_left_out(device):
    subject, timer = subject_of({1: 3.0, 2: 1.0})
    ticks = iter((0.0, 1.0, 11.0))
    table = tune([subject], device, timer=timer, seconds=10, clock=lambda: next(ticks))
    assert table["operators"]["subject"]["float16"].keys() == {"2x256"}
    assert table["not_tried"] == ["subject 2x1024"]


def test_implementations_are_compared_with_the_tuned_configurations(device):
    """The fastest that agrees is chosen; what is not installed, wrong or fails is not."""
    subject, _ = subject_of({1: 3.0, 2: 1.0})
    times = {"own": 2.0, "other": 1.5, "wrong": 0.1, "failing": 0.1, "missing": 0.1}

    def make(shape, device, dtype):
        def call():
            call.name = name = launch.choice("contest", torch.empty(0), shape, "own")
            with launch.record((9, 0)) as recorded:
                launch.config("subject", torch.empty(0, dtype=torch.float16), shape, {"ROWS": 1})
            call.rows = recorded.configurations["subject"][0]["ROWS"]
            if name == "missing":
                launch.unavailable("contest", name, "not installed")
            if name == "failing":
                raise RuntimeError("no")
            return torch.full((3,), 7.0 if name == "wrong" else 5.0)

        return call

    def timer(call):
        call()
        if hasattr(call, "name"):
            assert call.rows == 2  # the subject's best, not its default
            return times[call.name]
        return {1: 3.0, 2: 1.0}[call.rows]

    contest = tuning.Contest("contest", tuple(times), lambda B, N: [(B, N)], make)
    lines = []
    table = tune([subject], device, timer=timer, contests=[contest], report=lines.append)
    chosen = {"2x256": "other", "2x1024": "other"}
    assert table["choices"] == {"contest": {"float16": chosen}}
    assert "contest by missing is not available: not installed" in lines[-1]
    assert "wrong differs" in lines[-1]


def test_a_table_that_names_what_is_not_installed_says_so_once(monkeypatch):
    monkeypatch.setattr(launch, "_told", set())
    with pytest.warns(RuntimeWarning, match="names fa4 for attention, which is not available"):
        launch.unavailable("attention", "fa4", "flash-attn-4 is not installed")
    launch.unavailable("attention", "fa4", "flash-attn-4 is not installed")  # a warning would fail


@pytest.mark.parametrize("subject", tuning.SUBJECTS, ids=lambda each: each.op)
def test_every_subject_obeys_its_table(subject):
    """The shape that a subject names is the one that its launch asks for, at production sizes, and
    each candidate's keys are the launch's: on tensors without data, as for an H100."""
    shapes = [shape for B, N in ((2, 256), (32, 1024)) for shape in subject.shapes(B, N)]
    dtype = torch.bfloat16
    for shape in shapes:
        candidate = subject.candidates[-1]
        kind = "float8_e4m3fn" if subject.op.startswith("fp8") else "bfloat16"
        other = tuple(4 * size for size in shape)
        table = {"operators": {subject.op: {kind: {
            launch.shape_key(shape): candidate, launch.shape_key(other): {"num_warps": 1},
        }}}}  # fmt: skip
        with launch.record((9, 0)) as recorded, launch.using(table):
            subject.make(shape, torch.device("meta"), dtype)()
        assert any(candidate.items() <= each.kwargs.items() for each in recorded), shape


def test_tables_are_merged_by_shape_and_dtype():
    older = {"gpu": "x", "operators": {"op": {"float16": {"2x256": {"ROWS": 1}, "2x512": {}}}},
             "choices": {"op": {"float16": {"2x256": "own"}}}}  # fmt: skip
    newer = {"gpu": "x", "operators": {"op": {"float16": {"2x256": {"ROWS": 2}},
                                              "bfloat16": {"2x256": {}}}}}  # fmt: skip
    whole = tuning.merged(older, newer)
    assert whole["operators"]["op"] == {
        "float16": {"2x256": {"ROWS": 2}, "2x512": {}}, "bfloat16": {"2x256": {}},
    }  # fmt: skip
    assert whole["choices"] == older["choices"]


def test_tables_are_found_by_gpu_then_by_family(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16)
    default = {"ROWS": 4, "num_warps": 8}
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    assert launch.config("op", like, (2, 100), default) == default
    shapes = {"2x512": {"ROWS": 1}, "2x2048": {"ROWS": 2}, "64x512": {"ROWS": 8}}
    shipped = {"op": {"float16": shapes}}
    (tmp_path / "sm90.json").write_text(json.dumps({"operators": shipped}))
    launch.forget_tables()
    nearest = {(2, 10): 1, (2, 512): 1, (3, 600): 1, (2, 1023): 1, (2, 1025): 2, (2, 10**6): 2,
               (64, 400): 8, (16, 512): 8}  # fmt: skip
    for shape, rows in nearest.items():
        found = launch.config("op", like, shape, default)
        assert found == {"ROWS": rows, "num_warps": 8}, shape
    assert launch.config("other", like, (2, 512), default) == default
    assert launch.config("op", like.float(), (2, 512), default) == default


def test_the_nearest_shape_is_by_factors_and_equals_go_to_the_smaller():
    shapes = [(512, 1152), (2048, 1152), (2048, 4608)]
    assert launch.nearest(shapes, (1000, 1152)) == (512, 1152)
    assert launch.nearest(shapes, (1024, 1152)) == (512, 1152)  # a factor 2 either way
    assert launch.nearest(shapes, (1100, 1152)) == (2048, 1152)
    assert launch.nearest(shapes, (512, 4608)) == (512, 1152)
    assert launch.nearest(shapes, (0, 1)) == (512, 1152)


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device: `launch` makes it that of the tensors."""
    current, launched = [0], []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((current[0], grid, kwargs))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    with FakeTensorMode():
        here = torch.empty(3, device="cuda:0")
        there = torch.empty(3, device="cuda:1")
        descriptor = SimpleNamespace(base=there)
        for args in ((there,), (7, there), (descriptor, 1), ((None, (descriptor,)), 2)):
            launch.launch(Kernel(), (4,), *args, BLOCK=2)
        launch.launch(Kernel(), (4,), here)
    launch.launch(Kernel(), (4,), torch.empty(3))
    assert [device for device, *_ in launched] == [1, 1, 1, 1, 0, 0]
    assert launched[0][1:] == ((4,), {"BLOCK": 2})
    assert current == [0]


def test_the_dispatcher_is_passed_by_only_where_nothing_listens():
    x, weight = torch.ones(3), torch.nn.Parameter(torch.ones(3))

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Own(torch.Tensor):
        pass

    assert launch.direct(x, None)
    assert not launch.direct(x, weight)  # a gradient is wanted
    assert not launch.direct(x.as_subclass(Own))
    assert not launch.direct(x.to("meta"))
    with torch.no_grad():
        assert launch.direct(x, weight)
        with Listens():
            assert not launch.direct(x, weight)
        with FakeTensorMode() as mode:
            assert not launch.direct(mode.from_tensor(x))
        seen = []
        torch.vmap(lambda row: (seen.append(launch.direct(x)), row)[1])(torch.ones(2, 3))
        with pytest.warns(DeprecationWarning, match="jit.trace"):
            torch.jit.trace(lambda a: (seen.append(launch.direct(x)), a)[1], x, check_trace=False)
        compiled = torch.compile(lambda a: a + launch.direct(a), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), x)
        assert seen == [False, False]


def test_entries_of_an_older_version_and_unreadable_tables_are_passed_over(
    clean, monkeypatch, tmp_path
):
    like = torch.empty(1, dtype=torch.float16, device="meta")
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    old = {"op": {"float16": {"512": {"ROWS": 9}}}}
    path = launch.user_table_path("A GPU")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"operators": old}))
    with launch.record((9, 0), gpu="A GPU"):
        assert launch.config("op", like, (32, 512), {"ROWS": 1}) == {"ROWS": 1}
        for text in ("{", "[]", '{"operators": 1}'):
            path.write_text(text)
            launch.forget_tables()
            with pytest.warns(RuntimeWarning, match=r"cannot be read.*pixart-rt tune"):
                assert launch.config("op", like, (32, 512), {"ROWS": 1}) == {"ROWS": 1}


def test_an_implementation_is_chosen_by_table_or_by_force(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16)
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    choices = {"op": {"float16": {"512": "own", "8192": "cublas"}}}
    (tmp_path / "sm90.json").write_text(json.dumps({"operators": {}, "choices": choices}))
    assert launch.choice("op", like, (512,), "default") == "default"  # a CPU has no table
    with launch.record((9, 0)):
        assert launch.choice("op", like, (512,), "default") == "own"
        assert launch.choice("op", like, (8000,), "default") == "cublas"
        assert launch.choice("op", like.float(), (8000,), "default") == "default"
        with launch.choosing("op", "other"):
            assert launch.choice("op", like, (512,), "default") == "other"


def test_a_recording_knows_the_configurations_that_shapes_select(clean, monkeypatch, tmp_path):
    like = torch.empty(1, dtype=torch.float16, device="meta")
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    shipped = {"op": {"float16": {"512": {"ROWS": 1}, "2048": {"ROWS": 2}}}}
    (tmp_path / "sm80.json").write_text(json.dumps({"operators": shipped}))
    own = {"op": {"float16": {"512": {"ROWS": 16}}}}
    path = launch.user_table_path("A GPU")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"operators": own}))
    with launch.record((8, 0)) as recorded:
        for rows in (512, 600, 4096):
            launch.config("op", like, (rows,), {"num_warps": 4})
    assert recorded.configurations == {
        "op": [{"num_warps": 4, "ROWS": 1}, {"num_warps": 4, "ROWS": 2}]
    }
    with launch.record((8, 0), gpu="A GPU") as recorded:
        launch.config("op", like, (4096,), {"num_warps": 4})
    assert recorded.configurations == {"op": [{"num_warps": 4, "ROWS": 16}]}
