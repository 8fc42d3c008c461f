// Eight neighbouring words of workgroup memory for every lane, on any adapter.

fn prepare_eight() {}

fn eight(at: u32) -> array<f32, 8> {
    return array(shared_words[at], shared_words[at + 1u], shared_words[at + 2u], shared_words[at + 3u],
        shared_words[at + 4u], shared_words[at + 5u], shared_words[at + 6u], shared_words[at + 7u]);
}
