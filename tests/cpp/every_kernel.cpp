// The kernels of one instruction set, and no caller: what tests/ops/cpu_gate.py disassembles. -DPBF_SET=avx2 says which set.

#include "cpu/instruction_sets.h"

namespace pbf {

#define EVERY_KERNEL(set, T)                                                                                             \
    template std::unique_ptr<PackedWeights> set::pack_local_block(const LocalBlockWeights<T>&, int);                     \
    template std::unique_ptr<PackedWeights> set::pack_local_block_backward(const LocalBlockWeights<T>&, int);            \
    template std::unique_ptr<PackedWeights> set::pack_attention(const AttentionWeights<T>&, int);                        \
    template std::unique_ptr<PackedWeights> set::pack_attention_backward(const AttentionWeights<T>&, int);               \
    template void set::local_block(const PackedWeights&, const LocalBlock<T>&, const Layout&, int);                      \
    template void set::local_block_backward(const PackedWeights&, const LocalBlockBackward<T>&, const Layout&, int);     \
    template void set::attention(const PackedWeights&, const Attention<T>&, const std::vector<Tile>&, int);              \
    template void set::attention_backward(const PackedWeights&, const AttentionBackward<T>&, const std::vector<Tile>&,   \
                                          int);                                                                          \
    template std::unique_ptr<PackedWeights> set::pack_global_block(const GlobalBlockWeights<T>&, int);                   \
    template std::unique_ptr<PackedWeights> set::pack_conditioning(const ConditioningWeights<T>&, int);                  \
    template void set::global_block(const PackedWeights&, const GlobalBlock<T>&, int, int);                              \
    template void set::conditioning(const PackedWeights&, const T*, T*, T*, int, int);                                   \
    template void set::weight_gradient(const WeightGradient<T>&, std::int64_t, std::int64_t, int);                       \
    template void set::protein_sums(const T*, const std::int64_t*, const std::int64_t*, std::int64_t, float*, int, int); \
    template void set::gelu_of(const T*, T*, std::int64_t);                                                              \
    template std::unique_ptr<Workload> set::register_work<T>();                                                          \
    template std::unique_ptr<Workload> set::product_work<T>();

EVERY_KERNEL(PBF_SET, float)
EVERY_KERNEL(PBF_SET, bf16)

}  // namespace pbf
