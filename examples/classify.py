"""A classifier and a folder of images: ``python examples/classify.py``.

Without arguments the script writes the digits that come with the package into a folder of images, with a
sub-folder per class, and makes the package's network as fast as it can on this machine. With your own data:

    python examples/classify.py --model model.onnx --calib images/ --test labelled/ --preset imagenet

where ``labelled/`` has a sub-folder for every class, in the order of the network's outputs.
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

import netdecouple
from netdecouple import Preprocessing, kernels

DEMO = Path(netdecouple.__file__).parent / "demo"


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write the package's images as files: unlabelled ones for calibration, labelled ones for the test."""
    calib, test = folder / "calib", folder / "test"
    with np.load(DEMO / "digits.npz") as data:
        sets = [(calib, data["calib"], None), (test, data["images"], data["labels"])]
    for place, pictures, labels in sets:
        for index, picture in enumerate(pictures[..., 0]):
            path = place / ("" if labels is None else str(labels[index])) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return calib, test


def read(folder: Path, preprocessing: Preprocessing, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the images in the classes' sub-folders: preprocessed (N, C, H, W), and their classes (N,)."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    inputs, labels = [], []
    for label, place in enumerate(classes):
        for path in sorted(place.iterdir()):
            with Image.open(path) as picture:
                inputs.append(preprocessing.picture(picture, channels))
            labels.append(label)
    return np.concatenate(inputs), np.array(labels)


def predicted(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Classify images with ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    if kernels.available():
        kernels.register(options)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    parts = np.array_split(images, max(1, len(images) // 50))
    return np.concatenate([session.run(None, {name: part})[0].argmax(1) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description="Decouple a classifier, and compare both networks.")
    parser.add_argument("--model", type=Path, default=DEMO / "digits.onnx")
    parser.add_argument("--calib", type=Path, help="a folder of unlabelled images")
    parser.add_argument("--test", type=Path, help="a folder with a sub-folder of images for every class")
    parser.add_argument("--preset", default="none", help="imagenet, cifar10 or none: values in 0..1")
    parser.add_argument("--macs", help="multiply-adds that may stay; without: the fastest network")
    parser.add_argument("--out", type=Path, default=Path("out/classify"))
    given = parser.parse_args()
    if (given.calib is None) != (given.test is None):
        parser.error("give --calib and --test, or neither")
    calib, test = (given.calib, given.test) if given.calib else write_digits(given.out)

    original = onnx.load(given.model)
    shape = [d.dim_value for d in original.graph.input[0].type.tensor_type.shape.dim]
    preprocessing = Preprocessing.preset(given.preset).resized_for((shape[2], shape[3]))
    result = netdecouple.decouple(given.model, calib, macs=given.macs, preprocessing=preprocessing)
    given.out.mkdir(parents=True, exist_ok=True)
    result.save(given.out / "faster.onnx")

    images, labels = read(test, preprocessing, shape[1])
    before, after = predicted(original, images), predicted(result.model, images)
    report = result.report
    if report.speed is not None:
        print(f"{report.speed.before / report.speed.after:.2f}× faster")
    print(f"{report.macs_before / report.macs:.2f}× fewer MACs, {len(images)} test images")
    print(f"original    {np.mean(before == labels):.1%} right")
    print(
        f"decoupled   {np.mean(after == labels):.1%} right, the same class on {np.mean(before == after):.1%}"
    )
    print(f"written to  {given.out / 'faster.onnx'}")


if __name__ == "__main__":
    main()
