//! One start of one workload.

use serde::{Deserialize, Serialize};
use steadfast_api::UnixTime;

/// One start of one workload: a pod whose proxy restarts is a new one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Instance {
    /// The pod, from its token.
    pub pod_uid: String,
    /// When its proxy was started, as it says itself; the epoch: nobody has heard of it yet.
    pub started_at: UnixTime,
}
