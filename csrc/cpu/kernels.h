// All kernels, for one instruction set. Included once for each by instruction_sets.h, which says for which: no include guards
// and no includes of libraries here and in the files below.
//
// Every operation is element-wise over lanes or sums in a fixed order, so a row's result depends neither on its neighbors nor
// on the number of threads, nor on the tile it was computed in.

#include "vector.h"
#include "activations.h"
#include "layer_norm.h"
#include "product.h"
#ifdef PBF_TILES
#include "tile_product.h"
#endif
#include "weight_gradient.h"
#ifdef PBF_TILES
#include "tile_weight_gradient.h"
#endif
#include "convolution.h"
#include "convolution_gradient.h"
#include "local_block.h"
#include "attention.h"
#include "local_block_backward.h"
#include "attention_backward.h"
#include "global_block.h"
#include "protein_sums.h"
#include "peak.h"
