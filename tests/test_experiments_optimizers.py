"""The experiments on optimizers: optimizer_paths and seeds_matter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments import optimizer_paths, seeds_matter

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    config = optimizer_paths.Config(
        problems=("valley", "saddle"),
        optimizers=("sgd", "adam"),
        steps=50,
        rates=5,
        run_dir=tmp_path_factory.mktemp("r"),
    )
    return optimizer_paths.run(config)


def test_gradient_descent_down_the_valley_is_the_closed_form(paths):
    found = paths["results"]["valley"]["sgd"]
    # p ← (1 − rate · (1, 100)) p
    expected = np.array([10.0, 1.0]) * (1 - found["rate"] * np.array([1.0, 100.0])) ** np.arange(51)[:, None]
    np.testing.assert_allclose(found["path"], expected, rtol=1e-10, atol=1e-12)
    assert found["distance"] == pytest.approx(np.linalg.norm(expected[-1]))


def test_known_minima_are_minima_and_lbfgs_finds_them(paths):
    for title, problem in optimizer_paths.PROBLEMS.items():
        for minimum in problem.minima:
            value = float(problem.value(np.array(minimum)))
            for offset in ((1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2)):
                assert value < float(problem.value(np.add(minimum, offset))), (title, minimum)
    assert all(r["L-BFGS"]["distance"] < 1e-6 for r in paths["results"].values())


def test_distances_are_to_the_nearest_minimum_and_infinite_for_nan():
    problem = optimizer_paths.PROBLEMS["saddle"]
    found = optimizer_paths.distance(np.array([[0.0, 1.5], [0.3, -1.4], [np.nan, 0.0]]), problem)
    np.testing.assert_allclose(found, [0.5, 0.5, np.inf])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no optimizer 'adamm'; expected some of sgd"):
        optimizer_paths.run(optimizer_paths.Config(optimizers=("adamm",)))


def test_each_function_has_a_picture_with_a_named_panel_for_each_optimizer(tmp_path, monkeypatch):
    figures, original = [], optimizer_paths.new_figure
    monkeypatch.setattr(optimizer_paths, "new_figure", lambda *a, **o: figures.append(original(*a, **o)) or figures[-1])
    names = ("radam", "adam", "sgd", "lion")
    config = optimizer_paths.Config(
        problems=("valley", "saddle"), optimizers=names, steps=20, rates=2, run_dir=tmp_path, name="drawn"
    )
    results = optimizer_paths.run(config)["results"]
    for title, (figure, axes) in zip(("valley", "saddle"), figures, strict=True):
        assert (tmp_path / "optimizer_paths" / "drawn" / f"{title}.png").stat().st_size > 10000
        found = results[title]
        assert f"L-BFGS, of which no path is kept: {found['L-BFGS']['distance']:.1g} away" in figure.get_suptitle()
        panels = np.ravel(axes)
        for name, ax in zip(names, panels, strict=False):
            assert ax.get_title() == f"{name}, rate {found[name]['rate']:.2g}\n{found[name]['distance']:.1g} away"
            lines = {line.get_label(): line.get_xydata() for line in ax.lines}
            assert list(lines) == ["path", "start", "minimum", "end"]
            np.testing.assert_array_equal(lines["path"], found[name]["path"])
            np.testing.assert_array_equal(lines["end"], found[name]["path"][-1:])
        assert panels[0].get_ylabel() == "y" and panels[3].get_xlabel() == "x"  # at the outer panels
        assert not any(ax.axison for ax in panels[4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": 0}, "optimizer_paths: rates = 0; expected at least 1"),
        ({"steps": 0}, "optimizer_paths: steps = 0; expected at least 1"),
        ({"problems": ()}, "optimizer_paths: problems = 0; expected at least 1"),
        ({"low": 0.0}, "optimizer_paths: low = 0.0, high = 10.0; expected 0 < low <= high < inf"),
    ],
)
def test_options_out_of_range_are_named_and_leave_no_folder(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        optimizer_paths.run(optimizer_paths.Config(**options, run_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_differences_are_students_seed_by_seed():
    a = np.array([0.9, 0.92, 0.94, 0.9])
    b = np.array([0.8, 0.83, 0.83, 0.8])
    (row,) = seeds_matter.differences({"a": a, "b": b})
    # differences 0.10, 0.09, 0.11, 0.10: mean 0.1, s = √(2e-4/3), t(0.975, 3) = 3.182446
    assert row["mean"] == pytest.approx(0.1)
    assert row["half"] == pytest.approx(3.182446 * math.sqrt(2e-4 / 3) / 2, rel=1e-6)
    assert row["real"]
    (same,) = seeds_matter.differences({"a": a, "b": a + np.array([1, -1, 1, -1]) * 0.01})
    assert not same["real"]


@pytest.mark.slow
def test_every_seed_has_its_result_and_the_picture_is_drawn(tmp_path):
    config = seeds_matter.Config(optimizers=("sgd", "adam"), seeds=3, tuning_seeds=1, epochs=1, run_dir=tmp_path)
    found = seeds_matter.run(config)
    assert {len(a) for a in found["accuracies"].values()} == {3}
    assert all(0.1 < a.mean() <= 1 for a in found["accuracies"].values())
    assert all(rate in config.rates for rate in found["rates"].values())
    assert (found["folder"] / "spread.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="seeds = 1; expected at least 2"):
        seeds_matter.run(seeds_matter.Config(seeds=1))
