import pytest
import torch
from torch import Tensor, nn

from oracles.mixture import MixtureOracle
from trigflow.errors import UserError
from trigflow.process import TrigFlow
from trigflow.samplers import guided_velocity, network_velocity

PROCESS = TrigFlow(sigma_data=0.5)
ORACLE = MixtureOracle(
    torch.tensor([[-0.6, 0.3], [0.1, -0.5], [0.8, 0.2]]), torch.tensor([0.02, 0.05, 0.1]), torch.tensor([0.3, 0.2, 0.5])
)
LABEL = torch.tensor([0, 1, 2, 1])
TIMES = torch.tensor([0.2, 0.7, 1.1, 1.5])


class Recorder(nn.Module):
    """The mixture's teacher, remembering every call."""

    def __init__(self, takes_guidance: bool = False, null_label: int | None = 3) -> None:
        super().__init__()
        self.takes_guidance = takes_guidance
        self.null_label = null_label
        self.calls: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        self.calls.append((x, t, label, guidance))
        return ORACLE.F_velocity(x, t, label)


def states() -> Tensor:
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


def test_network_velocity_scales_in_and_out() -> None:
    x, network = states(), Recorder()
    v = network_velocity(network, PROCESS, LABEL)(x, TIMES)
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))
    given, t, label, guidance = network.calls[0]
    torch.testing.assert_close(given, x / 0.5)
    assert torch.equal(t, TIMES)
    assert label is not None
    assert torch.equal(label, LABEL)
    assert guidance is None


def test_network_velocity_without_label_is_unconditional() -> None:
    x, network = states(), Recorder()
    torch.testing.assert_close(network_velocity(network, PROCESS)(x, TIMES), ORACLE.velocity(x, TIMES))
    assert network.calls[0][2] is None


def test_one_label_and_one_scale_serve_the_whole_batch() -> None:
    network = Recorder(takes_guidance=True)
    network_velocity(network, PROCESS, label=2, guidance=1.5)(states(), TIMES)
    _, _, label, guidance = network.calls[0]
    assert label is not None
    assert guidance is not None
    assert label.dtype == torch.int64
    assert label.tolist() == [2, 2, 2, 2]
    assert guidance.tolist() == [1.5, 1.5, 1.5, 1.5]


def test_scales_of_each_sample_reach_the_network() -> None:
    network, scales = Recorder(takes_guidance=True), torch.tensor([1.0, 1.25, 1.5, 2.0])
    network_velocity(network, PROCESS, LABEL, scales)(states(), TIMES)
    assert torch.equal(network.calls[0][3], scales)  # type: ignore[arg-type]


def test_low_precision_output_is_returned_in_the_dtype_of_the_state() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        return ORACLE.F_velocity(x, t, label).bfloat16()

    assert network_velocity(network, PROCESS)(states(), TIMES).dtype == torch.float32
    assert guided_velocity(network, PROCESS, LABEL, 2.0, null_label=3)(states(), TIMES).dtype == torch.float32


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.4, 3.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale: float) -> None:
    x = states()
    uncond, cond = ORACLE.velocity(x, TIMES), ORACLE.velocity(x, TIMES, LABEL)
    v = guided_velocity(Recorder(), PROCESS, LABEL, scale)(x, TIMES)
    torch.testing.assert_close(v, uncond + scale * (cond - uncond))


def test_guidance_with_a_scale_for_each_sample() -> None:
    x, scales = states(), torch.tensor([1.0, 0.0, 2.0, 1.5])
    v = guided_velocity(Recorder(), PROCESS, LABEL, scales)(x, TIMES)
    singly = [
        guided_velocity(Recorder(), PROCESS, LABEL[i : i + 1], scales[i].item())(x[i : i + 1], TIMES[i : i + 1])
        for i in range(4)
    ]
    torch.testing.assert_close(v, torch.cat(singly))


def test_guidance_of_images_broadcasts_the_scale_over_all_axes() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        assert label is not None
        return x * label.reshape(-1, 1, 1, 1)

    x, scales = torch.ones(2, 3, 4, 4), torch.tensor([2.0, 3.0])
    v = guided_velocity(network, PROCESS, torch.tensor([0, 1]), scales, null_label=5)(x, torch.tensor([0.1, 0.2]))
    # F_uncond = 5 x / sd, F_cond = label x / sd.
    torch.testing.assert_close(v[:, 0, 0, 0], torch.tensor([5 + 2.0 * (0 - 5), 5 + 3.0 * (1 - 5)]))
    assert v.shape == x.shape


def test_both_branches_run_in_one_batched_call_equal_to_two() -> None:
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, LABEL, 1.7)(x, TIMES)
    assert len(network.calls) == 1
    given, t, label, guidance = network.calls[0]
    assert given.shape == (8, 2)
    assert t.shape == (8,)
    assert label is not None
    assert label.tolist() == [3, 3, 3, 3, *LABEL.tolist()]
    assert guidance is None
    uncond = network_velocity(network, PROCESS, 3)(x, TIMES)
    cond = network_velocity(network, PROCESS, LABEL)(x, TIMES)
    torch.testing.assert_close(v, uncond + 1.7 * (cond - uncond))


@pytest.mark.parametrize("scale", [1, 1.0, torch.tensor(1.0), torch.ones(4)])
def test_scale_one_skips_the_unconditional_branch(scale: float | Tensor) -> None:
    x, network = states(), Recorder()
    v = guided_velocity(network, PROCESS, LABEL, scale)(x, TIMES)
    assert [call[0].shape[0] for call in network.calls] == [4]
    torch.testing.assert_close(v, ORACLE.velocity(x, TIMES, LABEL))


def test_one_scale_other_than_one_needs_both_branches() -> None:
    network = Recorder()
    guided_velocity(network, PROCESS, LABEL, torch.tensor([1.0, 1.0, 1.0, 1.01]))(states(), TIMES)
    assert network.calls[0][0].shape[0] == 8


def test_null_label_argument_wins_over_the_attribute() -> None:
    network = Recorder(null_label=None)
    guided_velocity(network, PROCESS, LABEL, 2.0, null_label=3)(states(), TIMES)
    assert network.calls[0][2].tolist()[:4] == [3] * 4  # type: ignore[union-attr]


def test_mistakes_say_what_to_do() -> None:
    with pytest.raises(UserError, match=r"does not take one; expected guidance=None; call guided_velocity"):
        network_velocity(Recorder(), PROCESS, guidance=1.5)
    with pytest.raises(UserError, match=r"no guidance scale for a network that takes one; .*; pass guidance"):
        network_velocity(Recorder(takes_guidance=True), PROCESS)
    with pytest.raises(UserError, match=r"without a null label; .*; pass null_label"):
        guided_velocity(Recorder(null_label=None), PROCESS, LABEL, 2.0)
    with pytest.raises(UserError, match=r"takes the scale as an input; expected one without; use network_velocity"):
        guided_velocity(Recorder(takes_guidance=True), PROCESS, LABEL, 2.0)


@pytest.mark.parametrize("shape", [(3,), (4, 1)])
def test_labels_and_scales_must_match_the_batch(shape: tuple[int, ...]) -> None:
    x = states()
    labels = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(UserError, match=r"labels of shape .* for a batch of 4; expected one number or shape \(4,\)"):
        network_velocity(Recorder(), PROCESS, labels)(x, TIMES)
    with pytest.raises(UserError, match=r"labels of shape .* for a batch of 4"):
        guided_velocity(Recorder(), PROCESS, labels, 2.0)(x, TIMES)
    with pytest.raises(UserError, match=r"guidance scales of shape .* for a batch of 4"):
        guided_velocity(Recorder(), PROCESS, LABEL, 2 * torch.ones(shape))(x, TIMES)
    with pytest.raises(UserError, match=r"guidance scales of shape .* for a batch of 4"):
        network_velocity(Recorder(takes_guidance=True), PROCESS, LABEL, torch.ones(shape))(x, TIMES)
