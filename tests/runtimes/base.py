"""What every runtime that opens ONNX models must do; a member says which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from netdecouple.errors import ModelError, UnavailableError
from netdecouple.runtimes import Input, Runtime, runtime
from netdecouple.runtimes.feeds import random_feeds
from netdecouple.runtimes.onnxruntime import open_session, run
from tests import networks


def installed(name: str) -> Runtime:
    """The runtime, or skip the test; `pytest.importorskip` would import OpenVINO with its telemetry."""
    try:
        return runtime(name)
    except UnavailableError as error:
        pytest.skip(str(error))


class OnnxRuntimeCase:
    """Shared tests; the truth is a session of ONNX Runtime as the engine opens it."""

    name = ""

    @pytest.fixture
    def runtime(self) -> Runtime:
        return installed(self.name)

    def test_says_what_it_is(self, runtime: Runtime):
        """Its name, and a version that begins with a number."""
        assert runtime.name == self.name
        assert runtime.version.split(".")[0].isdigit()

    def test_inputs_are_those_declared(self, runtime: Runtime):
        """Name, shape and type; the batch is open."""
        inputs = runtime.open(networks.classifier(), 1).inputs
        assert inputs == (Input("image", (None, 3, 8, 8), np.dtype(np.float32)),)

    @pytest.mark.parametrize("maker", [networks.classifier, networks.residual, networks.detector])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_outputs(self, runtime: Runtime, maker, threads: int):
        """All of them, in order, in float32."""
        model = maker()
        feeds = {"image": networks.images_for(model, 3)}
        expected = run(open_session(model), None, feeds)
        found = runtime.open(model, threads).run(feeds)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_opens_a_file(self, runtime: Runtime, tmp_path: Path):
        """By its path, weights in a file beside it included."""
        model = networks.classifier()
        onnx.save(
            networks.classifier(),
            tmp_path / "net.onnx",
            save_as_external_data=True,
            location="w",
            size_threshold=0,
        )
        feeds = {"image": networks.images_for(model, 1)}
        found = runtime.open(tmp_path / "net.onnx", 1).run(feeds)
        np.testing.assert_allclose(found[0], run(open_session(model), None, feeds)[0], rtol=1e-4, atol=1e-5)

    def test_keeps_its_outputs(self, runtime: Runtime):
        """A later run does not write over what an earlier one returned."""
        session = runtime.open(networks.classifier(), 1)
        first = session.run(random_feeds(session.inputs))[0]
        kept = first.copy()
        session.run(random_feeds(session.inputs, seed=1))
        assert np.array_equal(first, kept)

    def test_refuses_what_it_cannot_open(self, runtime: Runtime, tmp_path: Path):
        """Files that are not there or no ONNX files, and objects that are no models."""
        (tmp_path / "text.onnx").write_text("hello")
        (tmp_path / "empty.onnx").write_text("")
        for model, message in (
            (tmp_path / "gone.onnx", "no such file"),
            (tmp_path / "text.onnx", "not an ONNX file"),
            (tmp_path / "empty.onnx", "not an ONNX file"),
            (3, "not a int"),
        ):
            with pytest.raises(ModelError, match=message):
                runtime.open(model, 1)

    def test_refuses_an_unknown_operator(self, runtime: Runtime):
        """One line."""
        model = networks.classifier()
        model.graph.node[0].op_type = "Convolve"
        with pytest.raises(ModelError, match="cannot open the model") as raised:
            runtime.open(model, 1)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "feeds", [{"image": np.zeros((1, 4, 8, 8), np.float32)}, {"imge": np.zeros((1, 3, 8, 8), np.float32)}]
    )
    def test_refuses_inputs_that_do_not_fit(self, runtime: Runtime, feeds):
        """Another shape, another name."""
        with pytest.raises(ModelError, match="failed on its input") as raised:
            runtime.open(networks.classifier(), 1).run(feeds)
        assert "\n" not in str(raised.value)
