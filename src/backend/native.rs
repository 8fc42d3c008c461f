//! Memory and threads of the native CPU device.

use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, ErrorKind, Result};

/// Sixteen words on a boundary of the caches' lines and of the widest vectors.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Blocks that tensors gave back, oldest first. Fresh memory costs a page fault for every 4 KiB, which a pass over a long sequence
/// would pay for each of its buffers.
#[derive(Default)]
struct Pool {
    blocks: VecDeque<Vec<Line>>,
    lines: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { blocks: VecDeque::new(), lines: 0 });

impl Pool {
    /// Smaller blocks are left to the allocator, which keeps them itself.
    const LEAST: usize = (64 << 10) / size_of::<Line>();
    /// Kept at most, of single blocks too; beyond it the oldest blocks go back to the system.
    const MOST: usize = (256 << 20) / size_of::<Line>();

    /// The smallest block of at least `lines` lines, and of no more than a quarter beyond.
    fn take(&mut self, lines: usize) -> Option<Vec<Line>> {
        let sizes = self.blocks.iter().map(Vec::len).enumerate();
        let (at, _) = sizes.filter(|(_, size)| (lines..=lines + lines / 4).contains(size)).min_by_key(|(_, size)| *size)?;
        let block = self.blocks.remove(at)?;
        self.lines -= block.len();
        Some(block)
    }

    /// Takes a block in; gives what has to go, for the caller to free without the lock.
    fn give(&mut self, block: Vec<Line>) -> Vec<Vec<Line>> {
        if block.len() > Self::MOST {
            return vec![block];
        }
        self.lines += block.len();
        self.blocks.push_back(block);
        let mut gone = Vec::new();
        while self.lines > Self::MOST
            && let Some(oldest) = self.blocks.pop_front()
        {
            self.lines -= oldest.len();
            gone.push(oldest);
        }
        gone
    }
}

/// Room for `len` words, of unspecified content; where there is none, the lines that it would have taken.
fn lines(len: usize) -> std::result::Result<Vec<Line>, usize> {
    let count = len.div_ceil(size_of::<Line>() / 4);
    let pooled = if count >= Pool::LEAST { POOL.lock().take(count) } else { None };
    pooled.map_or_else(|| bytemuck::allocation::try_zeroed_vec(count), Ok).map_err(|()| count)
}

fn give_back(lines: Vec<Line>) {
    if lines.len() >= Pool::LEAST {
        let gone = POOL.lock().give(lines);
        drop(gone);
    }
}

/// A block of 32-bit words that kernels lock while they run.
pub(crate) struct NativeBuffer {
    lines: RwLock<Vec<Line>>,
}

impl NativeBuffer {
    /// At least `len` words, of unspecified content.
    pub fn new(len: usize) -> Result<Self> {
        let lines = lines(len).map_err(|_| {
            let bytes = len.saturating_mul(4);
            Error::new(ErrorKind::OutOfMemory, format!("tensor: the CPU has no memory for {bytes} bytes"))
        })?;
        Ok(Self { lines: RwLock::new(lines) })
    }

    /// A view for reading. Two views of one buffer may be read at once, also by one thread.
    pub fn read<T: bytemuck::Pod>(&self, range: Range<usize>) -> MappedRwLockReadGuard<'_, [T]> {
        RwLockReadGuard::map(self.lines.read_recursive(), |lines| {
            bytemuck::cast_slice(&bytemuck::cast_slice::<_, u32>(lines)[range])
        })
    }

    /// A view for writing. No other view of this buffer may be held by the same thread: a kernel's outputs are no inputs.
    pub fn write<T: bytemuck::Pod>(&self, range: Range<usize>) -> MappedRwLockWriteGuard<'_, [T]> {
        RwLockWriteGuard::map(self.lines.write(), |lines| {
            bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<_, u32>(lines)[range])
        })
    }
}

impl Drop for NativeBuffer {
    fn drop(&mut self) {
        give_back(std::mem::take(self.lines.get_mut()));
    }
}

/// Room for numbers that a kernel needs while it runs, of unspecified content; on the boundary of a vector.
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

impl Scratch {
    pub fn new(len: usize) -> Self {
        Self { lines: lines(len).unwrap_or_else(|count| vec![bytemuck::Zeroable::zeroed(); count]) }
    }

    /// At least as many numbers as were asked for.
    pub fn numbers(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        give_back(std::mem::take(&mut self.lines));
    }
}

/// Threads that a kernel uses: as many as the system lets this process run at once.
pub(crate) fn threads() -> usize {
    static THREADS: OnceLock<usize> = OnceLock::new();
    *THREADS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// The threads themselves; `None` where the system gives none.
fn pool() -> Option<&'static ThreadPool> {
    static POOL: OnceLock<Option<ThreadPool>> = OnceLock::new();
    let name = |index| format!("gatefold-{index}");
    POOL.get_or_init(|| ThreadPoolBuilder::new().num_threads(threads()).thread_name(name).build().ok()).as_ref()
}

/// Calls `work(first, count)` for at most `parts` parts of `0..rows`, at once on several threads.
///
/// A kernel waits here with its buffers locked, so that its thread must not take up other work meanwhile, which may want the
/// same buffers. A worker of an application's rayon pool would: there a plain thread waits in its place.
pub(crate) fn for_parts(rows: usize, parts: usize, work: impl Fn(usize, usize) + Sync) {
    let size = rows.div_ceil(parts.clamp(1, rows));
    let (Some(pool), true) = (pool(), size < rows) else {
        return work(0, rows);
    };
    let run = || {
        pool.in_place_scope(|scope| {
            for first in (size..rows).step_by(size) {
                let work = &work;
                scope.spawn(move |_| work(first, size.min(rows - first)));
            }
            work(0, size);
        });
    };
    match rayon::current_thread_index() {
        None => run(),
        // Where the system gives no thread, all work is done here.
        Some(_) => std::thread::scope(|scope| {
            if std::thread::Builder::new().spawn_scoped(scope, run).is_err() {
                work(0, rows);
            }
        }),
    }
}

/// One of the threads that [`team`] runs side by side.
#[derive(Clone, Copy)]
pub(crate) struct Member<'a> {
    pub index: usize,
    /// How many there are.
    pub count: usize,
    barrier: Option<&'a Barrier>,
}

impl Member<'_> {
    /// A team of one.
    pub const ALONE: Member<'static> = Member { index: 0, count: 1, barrier: None };

    /// Returns once all members have called it: what they wrote before is seen after it. False where the team has dissolved: all that is
    /// left is the first member's to do.
    #[must_use]
    pub fn wait(&mut self) -> bool {
        let Some(barrier) = self.barrier else { return true };
        barrier.wait(self.count);
        let dissolved = barrier.dissolved.load(Ordering::Relaxed);
        if dissolved && self.index == 0 {
            *self = Member::ALONE;
        }
        !dissolved || self.index == 0
    }

    /// This member's share of `0..items`.
    pub fn share(&self, items: usize) -> Range<usize> {
        self.index * items / self.count..(self.index + 1) * items / self.count
    }
}

/// Where a team meets, as often as once in a few microseconds: its members spin, and yield to others when it takes longer.
#[derive(Default)]
struct Barrier {
    /// Of a brief team: members that have started, and what the first one then says.
    started: AtomicUsize,
    start: AtomicUsize,
    arrived: AtomicUsize,
    round: AtomicUsize,
    /// A member panicked: nobody may wait for it.
    broken: AtomicBool,
    /// A member waited for longer than steps take: another was preempted.
    late: AtomicBool,
    /// Whether that ends the team, and whether it has. Changes only while all but one wait, or before they start.
    is_brief: bool,
    dissolved: AtomicBool,
}

/// What a brief team's first member says to the others: nothing yet, to start, or that they are too late.
const PENDING: usize = 0;
const START: usize = 1;
const TOO_LATE: usize = 2;

impl Barrier {
    /// Turns of the loop before the thread offers its core to others: longer than a step of a balanced team takes to end.
    const SPINS: usize = 2000;
    /// The same before the first member gives up on those that have not started: longer than it takes to wake a thread on an idle core.
    const PATIENCE: usize = 4 * Self::SPINS;

    /// Whether member `index` of a brief team takes part: all start together, or the first one does everything.
    fn starts(&self, index: usize, members: usize) -> bool {
        if index == 0 {
            let all = || self.started.load(Ordering::Acquire) + 1 == members;
            let started = (0..Self::PATIENCE).any(|_| {
                std::hint::spin_loop();
                all()
            });
            self.dissolved.store(!started, Ordering::Relaxed);
            self.start.store(if started { START } else { TOO_LATE }, Ordering::Release);
            return started;
        }
        self.started.fetch_add(1, Ordering::AcqRel);
        let mut spins = 0;
        while self.start.load(Ordering::Acquire) == PENDING {
            Self::spin(&mut spins);
        }
        self.start.load(Ordering::Relaxed) == START
    }

    fn wait(&self, members: usize) {
        let round = self.round.load(Ordering::Relaxed);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == members {
            self.dissolved.store(self.is_brief && self.late.load(Ordering::Relaxed), Ordering::Relaxed);
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.round.load(Ordering::Acquire) == round {
            assert!(!self.broken.load(Ordering::Relaxed), "another thread of a sweep panicked");
            if Self::spin(&mut spins) {
                self.late.store(true, Ordering::Relaxed);
            }
        }
    }

    /// A turn of a loop that waits for another thread; true where that takes long.
    fn spin(spins: &mut usize) -> bool {
        *spins += 1;
        let is_long = *spins >= Self::SPINS;
        if is_long {
            std::thread::yield_now()
        } else {
            std::hint::spin_loop()
        }
        is_long
    }
}

/// Breaks the barrier if its member panics.
struct Breaker<'a>(&'a Barrier);

impl Drop for Breaker<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Ordering::Relaxed);
        }
    }
}

/// Back-off from cores that are oversubscribed: until when there are no brief teams, and for how long after the next that dissolves.
struct Crowd {
    until: Option<Instant>,
    pause: Duration,
}

impl Crowd {
    /// A time slice or two of an operating system.
    const SHORTEST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_secs(1);
}

/// Calls `work` for every member of a team of at most `members` threads that may wait for each other; for one member alone where
/// another team is at work, because the threads of two could wait for each other without end.
///
/// `is_brief`: the members meet every few microseconds, which is only worth it while each has a core for itself: where one must wait for
/// the system to give another its turn, the team dissolves, and there is none for some time, which doubles each time.
pub(crate) fn team(members: usize, is_brief: bool, work: impl Fn(Member<'_>) + Sync) {
    static CROWD: Mutex<Crowd> = Mutex::new(Crowd { until: None, pause: Crowd::SHORTEST });
    let count = members.min(threads());
    let (true, Some(_), Some(mut crowd)) = (count > 1, pool(), CROWD.try_lock()) else {
        return work(Member::ALONE);
    };
    if is_brief && crowd.until.is_some_and(|until| Instant::now() < until) {
        return work(Member::ALONE);
    }
    let barrier = Barrier { is_brief, ..Barrier::default() };
    for_parts(count, count, |index, parts| {
        let _breaker = Breaker(&barrier);
        let is_team = parts < count; // else the system gave no thread
        if is_team && (!is_brief || barrier.starts(index, count)) {
            work(Member { index, count, barrier: Some(&barrier) });
        } else if index == 0 {
            work(Member::ALONE);
        }
    });
    if barrier.dissolved.load(Ordering::Relaxed) {
        crowd.until = Some(Instant::now() + crowd.pause);
        crowd.pause = Crowd::LONGEST.min(2 * crowd.pause);
    } else if is_brief {
        crowd.pause = Crowd::SHORTEST;
    }
}

/// Memory that several threads write at places that differ from thread to thread.
pub(crate) struct Shared<'a>(*mut f32, usize, PhantomData<&'a mut [f32]>);

// SAFETY: threads reach the memory through `slice` and `read` alone, whose callers promise to stay apart.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(slice: &'a mut [f32]) -> Self {
        Self(slice.as_mut_ptr(), slice.len(), PhantomData)
    }

    /// The `len` numbers from `start` on.
    ///
    /// # Safety
    /// No other thread may use them, nor may this one through another slice that is still alive.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each caller owns the part that it asks for")]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start <= self.1 && len <= self.1 - start);
        // SAFETY: inside the allocation, by the assertion; alone, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// The same, for reading.
    ///
    /// # Safety
    /// No thread may write them meanwhile, nor may this one hold them for writing.
    #[inline(always)]
    pub unsafe fn read(&self, start: usize, len: usize) -> &[f32] {
        assert!(start <= self.1 && len <= self.1 - start);
        // SAFETY: inside the allocation, by the assertion; unchanged, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(start), len) }
    }

    /// `width` numbers of each of `rows` rows and `planes` planes, which are `row_step` and `plane_step` apart.
    #[inline(always)]
    pub fn part(&self, start: usize, [rows, row_step]: [usize; 2], [planes, plane_step]: [usize; 2], width: usize) -> Part<'_> {
        if rows > 0 && planes > 0 {
            let len = (rows - 1) * row_step + (planes - 1) * plane_step + width;
            assert!(start <= self.1 && len <= self.1 - start);
        }
        // No offset where there is nothing.
        let first = if rows > 0 && planes > 0 { self.0.wrapping_add(start) } else { self.0 };
        Part { first, rows, row_step, planes, plane_step, width, memory: PhantomData }
    }
}

/// A part of [`Shared`] memory that is walked row by row.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    first: *mut f32,
    rows: usize,
    row_step: usize,
    planes: usize,
    plane_step: usize,
    width: usize,
    memory: PhantomData<&'a [f32]>,
}

impl Part<'_> {
    /// A row of a plane.
    ///
    /// # Safety
    /// As for [`Shared::slice`].
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "each caller owns the part that it asks for")]
    pub unsafe fn slice(&self, row: usize, plane: usize) -> &mut [f32] {
        assert!(row < self.rows && plane < self.planes);
        let at = row * self.row_step + plane * self.plane_step;
        // SAFETY: inside the allocation, by the assertions here and in `part`; alone, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), self.width) }
    }

    /// The same, for reading.
    ///
    /// # Safety
    /// As for [`Shared::read`].
    #[inline(always)]
    pub unsafe fn read(&self, row: usize, plane: usize) -> &[f32] {
        assert!(row < self.rows && plane < self.planes);
        let at = row * self.row_step + plane * self.plane_step;
        // SAFETY: inside the allocation, by the assertions here and in `part`; unchanged, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.first.add(at), self.width) }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::{AtomicUsize, Barrier, Member, Ordering, Shared};

    /// Each of two members doubles its share of the numbers at every step and adds the neighbours' of the step before; the second one
    /// falls asleep at one of them. Returns the numbers, and how many members did the last step.
    fn run(barrier: &Barrier, sleep_at: Option<usize>) -> (Vec<f32>, usize) {
        const ITEMS: usize = 8;
        let mut numbers = [vec![1.0; ITEMS], vec![0.0; ITEMS]].concat();
        let (shared, last) = (&Shared::new(&mut numbers), &AtomicUsize::new(0));
        let work = |mut member: Member<'_>| {
            for step in 0..10 {
                if member.index == 1 && sleep_at == Some(step) {
                    thread::sleep(Duration::from_millis(50));
                }
                let (from, to) = (step % 2 * ITEMS, (step + 1) % 2 * ITEMS);
                for item in member.share(ITEMS) {
                    // SAFETY: members write shares of their own, and read what no one writes before they meet.
                    let (own, other) = unsafe { (shared.read(from + item, 1)[0], shared.read(from + (item + 1) % ITEMS, 1)[0]) };
                    // SAFETY: as above.
                    let next = unsafe { shared.slice(to + item, 1) };
                    next[0] = 2.0 * own + other + item as f32;
                }
                last.store(member.count, Ordering::Relaxed);
                if !member.wait() {
                    return;
                }
            }
        };
        thread::scope(|scope| {
            for index in 0..2 {
                scope.spawn(move || work(Member { index, count: 2, barrier: Some(barrier) }));
            }
        });
        (numbers, last.load(Ordering::Relaxed))
    }

    #[test]
    fn a_brief_team_dissolves_where_one_is_late_and_nothing_is_lost() {
        let lasting = Barrier::default;
        let brief = || Barrier { is_brief: true, ..Barrier::default() };
        let (want, members) = run(&lasting(), None);
        assert_eq!(members, 2);
        for sleep_at in [None, Some(0), Some(4), Some(9)] {
            assert_eq!(run(&lasting(), sleep_at), (want.clone(), 2), "lasting, asleep at {sleep_at:?}");
            assert_eq!(run(&brief(), sleep_at).0, want, "brief, asleep at {sleep_at:?}");
        }
        assert_eq!(run(&brief(), Some(4)).1, 1, "a brief team that waits for 50 ms stays");
    }

    #[test]
    fn a_brief_team_starts_together_or_not_at_all() {
        let barrier = Barrier { is_brief: true, ..Barrier::default() };
        assert!(!barrier.starts(0, 2), "the other has not started");
        assert!(!barrier.starts(1, 2), "the first one does everything");
        assert!(barrier.dissolved.load(Ordering::Relaxed));
    }
}
