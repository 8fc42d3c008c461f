// Eight neighbouring words of workgroup memory for every lane, with one load and not eight: for adapters whose subgroups have
// eight lanes, where a load costs one access a lane. All lanes of a subgroup must ask for the same words:
// subgroups are taken to be eight neighbouring lanes of the workgroup, which a case of every width would show to be wrong.

var<private> subgroup_place: u32; // of a lane in its subgroup

fn prepare_eight() { subgroup_place = subgroupExclusiveAdd(1u); }

fn eight(at: u32) -> array<f32, 8> {
    let word = shared_words[at + subgroup_place];
    return array(subgroupBroadcast(word, 0u), subgroupBroadcast(word, 1u), subgroupBroadcast(word, 2u), subgroupBroadcast(word, 3u),
        subgroupBroadcast(word, 4u), subgroupBroadcast(word, 5u), subgroupBroadcast(word, 6u), subgroupBroadcast(word, 7u));
}
