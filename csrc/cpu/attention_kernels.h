// All attention kernels of one instruction set. The order matters: each header uses what the ones before it define.
#include "cpu/vec.h"
#include "cpu/attention_rows.h"
#include "cpu/attention_products.h"
#include "cpu/attention_tiles.h"
#include "cpu/attention_tiles_backward.h"
