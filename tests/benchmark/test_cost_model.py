"""The cost model against numbers worked out by hand for the published sizes."""

import pytest

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.benchmark import cost_model
from proteinbert_fast.benchmark.cases import flops_per_token
from proteinbert_fast.benchmark.cost_model import ESTIMATES, Cost, Size

CONFIG = ProteinBertConfig()
ONE = Size(tokens=1, rows=1, proteins=0, spans=0, itemsize=2)
H100 = ESTIMATES["H100"]


def test_products_of_a_token():
    # 2 convolutions of 9 taps and a dense layer, each 128 x 128 multiplications with addition.
    assert cost_model.local_block(CONFIG, ONE, 128).flops == 2 * 19 * 128 * 128 == 622_592
    # 256 keys and 512 values of 128 channels; 256 products with the query, 512 with the weight.
    assert cost_model.span_sums(CONFIG, ONE).flops == 2 * (128 * 768 + 768) == 198_144


@pytest.mark.parametrize(
    "config", [CONFIG, ProteinBertConfig(d_local=64, d_global=96, n_heads=2, d_key=32, n_blocks=3, kernel_size=5)]
)
def test_a_forward_pass_is_4_92_million(config: ProteinBertConfig):
    local, sums = cost_model.local_block(config, ONE, 128).flops, cost_model.span_sums(config, ONE).flops
    assert config.n_blocks * (local + sums) == flops_per_token(config)
    assert flops_per_token(CONFIG) == pytest.approx(4.92e6, rel=1e-3)


def test_bytes_of_a_local_block():
    size = Size(tokens=128_000, rows=128_000, proteins=0, spans=0, itemsize=2)
    cost = cost_model.local_block(CONFIG, size, 128) * (1 / size.rows)
    # A row of 256 bytes in and out, and the protein of the row; weights are read once.
    assert cost.hbm_bytes == pytest.approx(2 * 256 + 4, rel=0.02)
    # 18 taps, residual, broadcast, store; 19 matrices of 32 KB for 128 rows.
    assert cost.l2_bytes == 21 * 256 + 19 * 32_768 / 128
    kept = cost_model.local_block(CONFIG, size, 128, n_kept=1) * (1 / size.rows)
    assert kept.hbm_bytes - cost.hbm_bytes == kept.l2_bytes - cost.l2_bytes == 256


def test_a_tile_that_stays_is_read_once_with_its_neighbours():
    size = Size(tokens=128_000, rows=128_000, proteins=0, spans=0, itemsize=2)
    cost = cost_model.local_block(CONFIG, size, 128, tile_stays=True) * (1 / size.rows)
    # 168 rows for 128; broadcast and store; 19 matrices.
    assert cost.l2_bytes == 168 / 128 * 256 + 2 * 256 + 19 * 32_768 / 128


def test_the_first_block_multiplies_symbols():
    # 18 taps of 32 symbols and a dense layer of 128 channels, each by 128.
    assert cost_model.first_block(CONFIG, ONE, 128).flops == 2 * (18 * 32 + 128) * 128


def test_larger_tiles_read_weights_less_often():
    size = Size(tokens=4096, rows=4096, proteins=1, spans=8, itemsize=2)
    small, large = (cost_model.local_block(CONFIG, size, rows).l2_bytes for rows in (64, 256))
    assert small - large == (4096 / 64 - 4096 / 256) * 19 * 32_768


def test_times_on_an_h100():
    cost = Cost(flops=790e12, hbm_bytes=1.5e12, l2_bytes=11e12, instructions=128 * 132 * 1.7e9 * 0.25)
    times = cost.times(H100, "bfloat16")
    assert times.by_bound == pytest.approx({"matrix": 1.0, "HBM": 0.5, "L2": 2.0, "instructions": 0.25})
    assert (times.bound_by, times.least) == ("L2", 2.0)
    assert times.serial == 2.0
    faster = Cost(flops=cost.flops, instructions=cost.instructions).times(H100, "bfloat16")
    assert (faster.bound_by, faster.least, faster.serial) == ("matrix", 1.0, pytest.approx(1.25))
    assert Cost(flops=395e12).times(H100, "tf32").least == 1.0


def test_special_functions_are_issued_16_a_clock():
    clocks = H100.multiprocessors * H100.clock
    assert Cost(special=16 * clocks).times(H100, "bfloat16").by_bound["instructions"] == pytest.approx(1.0)


def test_a_local_block_in_tiles_of_128_rows_is_bound_by_the_cache():
    size = Size(tokens=10**6, rows=10**6, proteins=2800, spans=3000, itemsize=2)
    times = cost_model.local_block(CONFIG, size, 128).times(H100, "bfloat16")
    assert times.bound_by == "L2"
    # (5,376 + 4,864) bytes at 5.5 TB/s are 1.86 ns; 622,592 FLOP at 790 TFLOP/s are 0.79.
    assert times.least == pytest.approx(1.86e-3, rel=0.01)
    assert times.by_bound["matrix"] == pytest.approx(0.788e-3, rel=0.01)


def test_linear_layers():
    cost = cost_model.linear(1600, 128, 26, 2)
    assert cost.flops == 2 * 1600 * 128 * 26
    assert cost.hbm_bytes == 1600 * 256 + 128 * 26 * 2 + 1600 * 52
    # One tile of 64 columns holds all 26; 100 tiles of 16 rows read the weights each.
    assert cost.l2_bytes == 1600 * 256 + 100 * 128 * 26 * 2 + 1600 * 52
    assert cost_model.linear(16, 512, 8943, 2).l2_bytes > 140 * 16 * 512 * 2


def test_global_track_reads_its_weights_for_every_16_proteins():
    def l2(proteins: int) -> float:
        return cost_model.global_track(CONFIG, Size(0, 0, proteins, 0, 2)).l2_bytes

    assert l2(17) - l2(16) == 2 * 512 * 512 * 2 + 6 * 512 * 2


def test_a_forward_pass_adds_its_kernels_up():
    size = Size(tokens=10**6, rows=1_060_000, proteins=2800, spans=4000, itemsize=2)
    spent = cost_model.forward_seconds(CONFIG, size, 128, H100, "bfloat16")
    kernels = (cost_model.local_block(CONFIG, size, 128), cost_model.span_sums(CONFIG, size))
    assert sum(spent.values()) == pytest.approx(6 * sum(k.times(H100, "bfloat16").least for k in kernels))
    block = cost_model.block(CONFIG, size, 128)
    assert block.flops > sum(k.flops for k in kernels)
    assert spent["L2"] > 0


def test_the_backward_pass_has_twice_the_products_and_what_is_computed_again():
    later, first = CONFIG.n_blocks - 1, 1
    costs = cost_model.training_costs(CONFIG, ONE, 128)
    flops = sum(n * cost.flops for name, (n, cost) in costs.items() if name != "token loss")
    # Of the first block, the products that are made of one-hot rows; each later one's twice in the backward pass.
    blocks = later * 3 * cost_model.local_block(CONFIG, ONE, 128).flops + CONFIG.n_blocks * (
        cost_model.span_sums(CONFIG, ONE).flops + 4 * 2 * 128 * 768
    )
    one_hot = cost_model.first_block(CONFIG, ONE, 128).flops + 2 * 19 * 32 * 128 + 2 * 2 * 128 * 128
    # The dense layer's product is made again in each block.
    assert flops == blocks + first * one_hot + CONFIG.n_blocks * 2 * 128 * 128


def test_bytes_of_a_pointwise_gradient():
    size = Size(tokens=128_000, rows=128_000, proteins=0, spans=0, itemsize=2)
    cost = cost_model.pointwise(CONFIG, size) * (1 / size.rows)
    assert cost.l2_bytes == 15 * 256 + 32_768 / 32
    # Four states read, five written, three of them read again; seven sums of 128 numbers per 32 rows, out and in.
    assert cost.hbm_bytes == 12 * 256 + 4 + 2 * 7 * 128 * 4 / 32


def test_a_training_step_adds_its_kernels_up():
    size = Size(tokens=10**6, rows=1_060_000, proteins=2800, spans=4000, itemsize=2)
    spent = cost_model.training_seconds(CONFIG, size, 128, H100, "bfloat16", tile_stays=True)
    costs = cost_model.training_costs(CONFIG, size, 128, tile_stays=True)
    assert sum(spent.values()) == pytest.approx(sum(n * c.times(H100, "bfloat16").least for n, c in costs.values()))
    assert sum(spent.values()) > 2.5 * sum(
        cost_model.forward_seconds(CONFIG, size, 128, H100, "bfloat16", tile_stays=True).values()
    )


def test_costs_add_up():
    assert Cost(1, 2, 3, 4, 5) + Cost(1, 1, 1, 1, 1) * 2 == Cost(3, 4, 5, 6, 7)


def test_devices_are_known_by_name():
    assert cost_model.estimated_peaks("NVIDIA H200").hbm == 4.3e12
    assert cost_model.estimated_peaks("NVIDIA H100 80GB HBM3") is H100
    assert "estimate" in cost_model.estimated_peaks("something else").source
