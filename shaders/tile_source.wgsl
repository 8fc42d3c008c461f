// What the lanes of a tiled product carry from the buffers to workgroup memory: A's rows or B's columns, here both called lines, SIDE words
// along k of each. Of A and B either the words along k or the lines lie side by side. The first half of the lanes carries from A, the
// other from B, each a square of 4 words along k of 4 lines, in vectors along what lies side by side.

const TILE = 8u * SIDE; // lines of either operand
const LANES = SIDE * SIDE;

struct Source {
    operand: u32, // 0: A, 1: B
    k: u32,       // of its square, in a block
    vector: u32,  // of the lines of its square, in the tile
    line: u32,
    lines: u32,   // of the operand
    at: u32,      // of the first word of its square, in the buffer
    along: u32,   // words from one to the next along k
    across: u32,  // and from line to line
}

// `corner`: the tile's first row and column.
fn source_of(lane: u32, corner: vec2<u32>) -> Source {
    var s = Source();
    s.operand = lane / (LANES / 2u);
    if s.operand == 0u {
        s.line = corner.x; s.lines = params.m;
        s.at = params.a_offset; s.along = params.a_col; s.across = params.a_row;
    } else {
        s.line = corner.y; s.lines = params.n;
        s.at = params.b_offset; s.along = params.b_row; s.across = params.b_col;
    }
    // Neighbouring lanes load neighbouring vectors.
    let number = lane % (LANES / 2u);
    if s.along == 1u {
        s.k = 4u * (number % (SIDE / 4u));
        s.vector = number / (SIDE / 4u);
    } else {
        s.k = 4u * (number / (2u * SIDE));
        s.vector = number % (2u * SIDE);
    }
    s.line += 4u * s.vector;
    s.at += s.line * s.across + s.k * s.along;
    return s;
}

// Vectors x, y, z, w, as they lie in the buffer.
struct Square { x: Words, y: Words, z: Words, w: Words }

// The lane's square of the block that starts at `k`; zeros from `end` on, and past the last line.
fn fetch(s: Source, k: u32, end: u32) -> Square {
    var p = Square();
    let words = end - min(end, k + s.k);
    let lines = s.lines - min(s.lines, s.line);
    let at = s.at + k * s.along;
    if words > 0u && lines > 0u {
        // How many numbers of a vector there are, how many vectors, and how far apart they lie.
        let long = select(lines, words, s.along == 1u);
        let count = select(words, lines, s.along == 1u);
        let step = select(s.along, s.across, s.along == 1u);
        p.x = load(s.operand, at, long);
        if count > 1u { p.y = load(s.operand, at + step, long); }
        if count > 2u { p.z = load(s.operand, at + 2u * step, long); }
        if count > 3u { p.w = load(s.operand, at + 3u * step, long); }
    }
    return p;
}

// The square with vectors along the lines, one for each k.
fn by_k(s: Source, p: Square) -> Square {
    if s.along == 1u { return transposed(p); }
    return p;
}

// And with vectors along k, one for each line.
fn by_line(s: Source, p: Square) -> Square {
    if s.along == 1u { return p; }
    return transposed(p);
}

fn transposed(p: Square) -> Square {
    return Square(Words(p.x.x, p.y.x, p.z.x, p.w.x), Words(p.x.y, p.y.y, p.z.y, p.w.y),
        Words(p.x.z, p.y.z, p.z.z, p.w.z), Words(p.x.w, p.y.w, p.z.w, p.w.w));
}
