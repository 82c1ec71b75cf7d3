from turbodiff.plan.calibration import (
    ESTIMATOR,
    HIGHEST,
    LOWEST,
    Calibration,
    Kind,
    Sample,
    append_sample,
    calibrate,
    read_samples,
)
from turbodiff.spec.numbers import GIB

KIND = Kind(
    gpu="RTX 4090",
    total_bytes=24 * GIB,
    torch="2.11.0",
    cudnn="9.16",
    attention="sagesla",
    model="wan2.1-14b",
    int8=True,
    width=1280,
    height=720,
    num_frames=81,
)


def sample(ratio: float, kind: Kind = KIND, **facts) -> Sample:
    return Sample(kind=kind, phase="denoise", predicted_bytes=GIB, measured_bytes=round(ratio * GIB), **facts)


def test_without_samples_the_formula_stands():
    assert calibrate([], KIND) == Calibration(1.0, 0)


def test_an_underestimate_counts_at_once_an_overestimate_slowly():
    assert abs(calibrate([sample(1.1)], KIND).factor - 1.1) < 1e-6
    once, often = calibrate([sample(0.9)], KIND).factor, calibrate([sample(0.9)] * 30, KIND).factor
    assert 0.9 < often < once < 1.0


def test_the_factor_is_bounded_both_ways():
    assert calibrate([sample(5.0)], KIND).factor == HIGHEST
    assert calibrate([sample(0.1)] * 50, KIND).factor == LOWEST


def test_a_wrong_sample_fades():
    assert calibrate([sample(1.2), *[sample(1.0)] * 50], KIND).factor < 1.01


def test_samples_of_another_torch_or_cudnn_teach_nothing():
    for other in ({"torch": "2.9.1"}, {"cudnn": "9.10"}, {"gpu": "RTX 3090"}, {"attention": "dense"}):
        assert calibrate([sample(1.2, KIND.model_copy(update=other))], KIND).samples == 0


def test_samples_of_an_older_formula_teach_nothing():
    assert calibrate([sample(1.2, estimator=ESTIMATOR - 1)], KIND).samples == 0


def test_a_new_shape_borrows_from_its_neighbours():
    short = KIND.model_copy(update={"num_frames": 49})
    small = KIND.model_copy(update={"num_frames": 49, "width": 832, "height": 480})
    assert abs(calibrate([sample(1.1, short)], KIND).factor - 1.1) < 1e-6
    assert abs(calibrate([sample(1.1, small)], KIND).factor - 1.1) < 1e-6


def test_samples_survive_a_file_with_a_line_cut_short(tmp_path):
    path = tmp_path / "state" / "samples.jsonl"
    append_sample(path, sample(1.1))
    append_sample(path, sample(1.2))
    path.write_text(path.read_text() + '{"kind": {"gpu"')
    assert [round(s.measured_bytes / s.predicted_bytes, 3) for s in read_samples(path)] == [1.1, 1.2]
    assert read_samples(tmp_path / "none.jsonl") == []
