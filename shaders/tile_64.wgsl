// Tiles of 64 rows and columns, by 64 lanes.
const SIDE = 8u;
