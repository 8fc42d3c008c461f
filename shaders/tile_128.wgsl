// Tiles of 128 rows and columns, by 256 lanes.
const SIDE = 16u;
