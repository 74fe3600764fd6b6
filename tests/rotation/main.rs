//! Trust anchors and issuers rotate, under load and whatever happens to the processes around them.
//!
//! Most of the time they wait for a fence, so many of them run at once.

mod aborted;
mod anchors;
mod commands;
mod controllers;
mod emptied;
mod expired;
mod frozen;
mod issuer;
mod killed;
mod lost_keys;
mod replica;
mod restored;
mod resumed;
mod stolen;
mod support;
mod token;
mod tombstoned;
mod under_load;
