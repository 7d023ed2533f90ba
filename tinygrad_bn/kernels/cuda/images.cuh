// Where an entry of an image stands.
//
// Images are (outer, rows, columns, inner), whichever the layout: for NCHW outer is N C and inner 1,
// for NHWC outer is N and inner C. So both have one text, and the threads of a warp have neighbours
// in memory in both.
//
// To be defined: INDEX, "unsigned" where it can number every entry, since dividing 64 bits costs
// several times as much, else "unsigned long long"; THREADS of a block.

// Where entry `number` of an array (outer, rows, columns, inner) stands.
struct Place {
  INDEX outer, inner;
  int row, column;

  __device__ Place(INDEX number, int rows, int columns, INDEX width) {
    INDEX pixel = width == 1 ? number : number / width;
    inner = number - pixel * width;
    INDEX line = pixel / (INDEX)columns;
    column = (int)(pixel - line * (INDEX)columns);
    outer = line / (INDEX)rows;
    row = (int)(line - outer * (INDEX)rows);
  }
};

__device__ __forceinline__ INDEX offset(INDEX outer, int row, int column, INDEX inner, int rows,
                                        int columns, INDEX width) {
  return ((outer * (INDEX)rows + (INDEX)row) * (INDEX)columns + (INDEX)column) * width + inner;
}

// Set `number` to the entry that this thread makes; false if there is none.
__device__ __forceinline__ bool mine(INDEX& number, long long count) {
  long long wide = (long long)blockIdx.x * THREADS + threadIdx.x;
  number = (INDEX)wide;
  return wide < count;
}
