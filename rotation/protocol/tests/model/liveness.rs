//! Whether the end can be reached from everywhere.
//!
//! A model checker without fairness cannot say that something happens at last. What it can say is
//! that it never becomes impossible: from every state that can be reached, with all that may go
//! wrong, a state is reached in which everything is settled.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher as _;

use stateright::Model;

/// What came of it.
pub(crate) struct Reach {
    pub(crate) states: usize,
    /// The actions to a state from which no end can be reached.
    pub(crate) stuck: Option<Vec<String>>,
}

/// Looks at every state there is.
pub(crate) fn reach<M: Model>(model: &M, is_end: impl Fn(&M::State) -> bool) -> Reach
where
    M::State: std::hash::Hash + Clone,
    M::Action: std::fmt::Debug + Clone,
{
    let hasher = std::hash::BuildHasherDefault::<std::hash::DefaultHasher>::default();
    let print = |state: &M::State| hasher.hash_one(state);
    let mut known: HashMap<u64, u32> = HashMap::new();
    let mut before: Vec<Vec<u32>> = Vec::new();
    let mut first: Vec<Option<(u32, String)>> = Vec::new();
    let mut ends = Vec::new();
    let mut queue = VecDeque::new();
    for state in model.init_states() {
        known.insert(print(&state), before.len() as u32);
        before.push(Vec::new());
        first.push(None);
        queue.push_back(state);
    }
    let mut from = 0_u32;
    let mut actions = Vec::new();
    while let Some(state) = queue.pop_front() {
        if is_end(&state) {
            ends.push(from);
        }
        actions.clear();
        model.actions(&state, &mut actions);
        for action in actions.drain(..) {
            let name = format!("{action:?}");
            let Some(next) = model.next_state(&state, action) else { continue };
            let to = *known.entry(print(&next)).or_insert_with(|| {
                before.push(Vec::new());
                first.push(Some((from, name)));
                queue.push_back(next);
                before.len() as u32 - 1
            });
            before[to as usize].push(from);
        }
        from += 1;
    }
    let mut reaches = vec![false; before.len()];
    while let Some(state) = ends.pop() {
        if !std::mem::replace(&mut reaches[state as usize], true) {
            ends.extend(&before[state as usize]);
        }
    }
    let stuck = reaches.iter().position(|reaches| !reaches).map(|mut at| {
        let mut path = Vec::new();
        while let Some((from, action)) = &first[at] {
            path.push(action.clone());
            at = *from as usize;
        }
        path.reverse();
        path
    });
    Reach { states: before.len(), stuck }
}
