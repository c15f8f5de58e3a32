import copy
import io
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from normprop import convert, fold, models
from tests.graph.families import FAMILIES

# What torch's exporters and torchao say of torch's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

ORDINARY = {
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "GlobalAveragePool",
    "LessOrEqual", "MatMul", "Max", "MaxPool", "Mul", "ReduceMean", "Relu", "Reshape", "Resize", "Shape", "Tanh",
    "Where",
}  # fmt: skip
BATCH = ({0: torch.export.Dim("batch", min=1)},)


def converted(name):
    case = FAMILIES[name]()
    return convert(case.model, case.args), case.args[0]


def native(name):
    return models.create(name, (3, 16, 16), 10, width=0.25), torch.randn(2, 3, 16, 16)


NETWORKS = {
    "nin": lambda: native("nin"),
    "resnet8": lambda: native("resnet8"),
    "unet_2d": lambda: converted("unet_2d"),
    "dcgan": lambda: converted("dcgan"),
    "resnet_v2": lambda: converted("resnet_v2"),
}


def folded(name):
    """A network with parameters off their initial values, folded, and an input."""
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return net.eval(), fold(net, x), x


def close(own, expected):
    torch.testing.assert_close(own, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_export_and_back(name):
    net, plain, x = folded(name)
    file = io.BytesIO()
    torch.export.save(torch.export.export(plain, (x,), dynamic_shapes=BATCH), file)
    file.seek(0)
    program = torch.export.load(file)
    with torch.no_grad():
        close(program.module()(x[:1]), net(x[:1]))
    operators = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert not [operator for operator in operators if re.search(r"norm|sqrt|exp|erf", str(operator))]


def test_compiled_as_one_graph():
    net, plain, x = folded("resnet8")
    with torch.no_grad():
        close(torch.compile(plain, fullgraph=True, backend="aot_eager")(x), net(x))


def test_gradients_of_single_samples():
    _, plain, x = folded("nin")
    parameters = dict(plain.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(plain, parameters, (sample[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    plain(x[1:2]).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name][1], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_holds_ordinary_operators_and_agrees(name):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    net, plain, x = folded(name)
    program = torch.onnx.export(plain, (x,), dynamo=True, verbose=False, dynamic_shapes=BATCH)
    model = program.model_proto
    operators = Counter(node.op_type for node in model.graph.node)
    assert set(operators) <= ORDINARY
    convolutions = sum(isinstance(module, torch.nn.modules.conv._ConvNd) for module in plain.modules())
    assert operators["Conv"] + operators["ConvTranspose"] == convolutions
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (x, torch.randn(3, *x.shape[1:])):
        (output,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        with torch.no_grad():
            close(torch.from_numpy(output), net(batch))


# torchao leaves a pooling behind a threshold in floating point, and says so at length.
@pytest.mark.filterwarnings("ignore:The input of maxpool2d is not quantized:UserWarning")
@pytest.mark.parametrize("method", ["normprop", "normprop-paper"])
def test_eight_bits_cost_at_most_a_point(method):
    pytest.importorskip("torchao", reason="torchao is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from normprop.data import digits

    torch.manual_seed(0)
    data = digits.load()
    images, labels = data.train.images, data.train.labels
    net = models.nin(1, 10, width=0.125, norm=method)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(6):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    plain = fold(net, images[:8])
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    program = torch.export.export(plain, (images[:8],), dynamic_shapes=BATCH)
    prepared = prepare_pt2e(program.module(), quantizer)

    @torch.no_grad()
    def accuracy(model):
        return float((model(data.test.images).argmax(1) == data.test.labels).double().mean())

    with torch.no_grad():
        prepared(images[:256])
    quantized = convert_pt2e(copy.deepcopy(prepared))
    exact = accuracy(plain)
    assert exact > 0.9
    assert accuracy(quantized) >= exact - 0.01
    calls = [str(node.target) for node in quantized.graph.nodes if node.op == "call_function"]
    assert sum("dequantize_per_channel" in call for call in calls) == 9  # every convolution has eight-bit weights


def test_the_page_runs(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "torchao"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["logits"].shape == (8, 10)
    assert {path.name for path in tmp_path.iterdir()} >= {"plain.pt2", "plain.onnx"}
