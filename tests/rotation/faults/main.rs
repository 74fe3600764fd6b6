//! Rotations survive what happens to the processes around them, with real processes and under load.
//!
//! Most of the time they wait for a fence, so all of them run at once.

mod aborted;
mod emptied;
mod expired;
mod frozen;
mod issuer;
mod killed;
mod replica;
mod restored;
mod resumed;
mod stolen;
mod support;
mod tombstoned;
