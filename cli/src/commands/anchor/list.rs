//! `steadfast anchor list`.

use std::time::Duration;

use serde::Serialize;
use steadfast_api::{KeyId, UnixTime};
use steadfast_process::{Clock as _, SystemClock, duration};

use crate::mesh::Mesh;
use crate::output::{Format, table};
use crate::problem::Problem;
use crate::trust_domain;

/// List the trust anchors: state, key, end
#[derive(Debug, clap::Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    mesh: Mesh,
    /// The form of the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORM")]
    output: Format,
}

/// An anchor, as it is listed.
#[derive(Serialize)]
struct AnchorView {
    id: KeyId,
    state: String,
    key: String,
    not_after: UnixTime,
    ends: String,
    left_s: u64,
    tainted_by: Option<String>,
}

pub(super) async fn list(args: &ListArgs) -> Result<(), Problem> {
    let (state, now) = (trust_domain::read(&args.mesh).await?, SystemClock.now());
    let anchors = state.anchors.iter().map(|anchor| AnchorView {
        id: anchor.id,
        state: format!("{:?}", anchor.state).to_lowercase(),
        key: anchor.key_ref.clone(),
        not_after: anchor.not_after,
        ends: anchor.not_after.to_string(),
        left_s: anchor.not_after.since(now).as_secs(),
        tainted_by: anchor.taint.as_ref().map(|taint| taint.by.clone()),
    });
    let anchors: Vec<_> = anchors.collect();
    Ok(args.output.print(&anchors, |anchors| listing(anchors))?)
}

fn listing(anchors: &[AnchorView]) -> String {
    let rows: Vec<_> = anchors
        .iter()
        .map(|anchor| {
            let left = Duration::from_secs(anchor.left_s);
            let tainted = anchor.tainted_by.as_ref().map(|by| format!(", tainted by {by}"));
            [
                anchor.id.short(),
                format!("{}{}", anchor.state, tainted.unwrap_or_default()),
                anchor.key.replace(&anchor.id.to_string(), &anchor.id.short()),
                anchor.ends.clone(),
                if left.is_zero() { "expired".to_owned() } else { duration::show(left) },
            ]
        })
        .collect();
    table(["ID", "STATE", "KEY", "ENDS", "LEFT"], &rows)
}
