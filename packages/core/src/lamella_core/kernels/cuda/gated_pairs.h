// The order in which the tiles of a product are computed, by clusters of two blocks: of `gated_product.cu`.
//
// A pair is what a cluster computes at a time: two tiles of rows and one of weights (tall) or, for the last tile of an
// odd number of row tiles, this one and two of weights (wide). The last pairs may be computed in halves, with the first
// and the second half of each tile of weights, so that more clusters have one.

constexpr int BLOCK_ROWS = 128;
constexpr int GROUP = 8;  // tall pairs that share weights take turns first, so that these stay in the L2 cache

// What one block computes at a time: a tile of rows times one of weights, or half of it.
struct Unit {
  int row, tile;  // the first row; of weights: beyond the last for the second block of a wide pair with one tile
  bool is_wide, is_half;
  int half;  // of the tile of weights, 0 or 1; 0 for a whole one
};

struct Pairs {
  int tiles;         // of weights
  int tall, alone;   // pairs of row tiles; row tiles without another, 0 or 1
  int whole, count;  // pairs that are not computed in halves; turns of clusters, those for halves included

  __device__ Pairs(int rows, int tiles, int halved) : tiles(tiles) {
    const int row_tiles = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    tall = row_tiles / 2, alone = row_tiles % 2;
    const int pairs = tall * tiles + alone * ((tiles + 1) / 2);
    whole = pairs - halved, count = pairs + halved;
  }

  // Tall pairs are computed in groups, with one tile of weights after the other. In the last group the wide pair with
  // two tiles comes before the tall pairs with the same two, so that these are read from memory once.
  __device__ Unit unit(int turn, int rank) const {
    const int in_halves = turn < whole ? 0 : turn - whole, pair = turn - in_halves + in_halves / 2;
    const int group = least(pair / (GROUP * tiles), (tall - 1) / GROUP), first = group * GROUP;
    const int size = least(GROUP, tall - first), wide = tall - first <= GROUP ? alone : 0;
    const int inside = pair - first * tiles, of_two_tiles = 2 * size + wide;
    const int tile = inside / of_two_tiles * 2, at = inside % of_two_tiles - wide, is_second = at >= size;
    const bool is_wide = at < 0;
    const int row_tile = is_wide ? 2 * tall : 2 * (first + at - is_second * size) + rank;
    return {row_tile * BLOCK_ROWS, tile + (is_wide ? rank : is_second), is_wide, turn >= whole, in_halves % 2};
  }

 private:
  __device__ static int least(int a, int b) { return a < b ? a : b; }
};
