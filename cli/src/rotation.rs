//! Rotations as a person sees them: the plan before, the course of one under way, the wait that it
//! is in. All of it is derived from what the store holds and what steadfast-rotation tells.

pub(crate) mod course;
pub(crate) mod follow;
pub(crate) mod look;
pub(crate) mod ordered;
pub(crate) mod plan;
pub(crate) mod waiting;
