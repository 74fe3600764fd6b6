//! `steadfast anchor exempt` and `unexempt`: whom no census waits for.

use steadfast_api::UnixTime;
use steadfast_rotation_protocol::Instance;
use steadfast_rotation_protocol::census::Round;
use steadfast_rotation_protocol::trust_domain::Exemption;

use crate::confirm::{OrderArgs, confirm};
use crate::controller::Controller;
use crate::problem::Problem;
use crate::suggest::nearest;
use crate::trust_domain;

use super::{AnchorError, MeshArgs, change, said};

/// Let a rotation go on without a workload that it misses
///
/// The exemption is of this one instance of the pod. While it lasts, the workload may be refused by
/// others and refuse them. It ends by itself when the workload answers, or starts anew.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  steadfast anchor exempt demo/web-0 --reason \"its node is being repaired\"")]
pub(super) struct ExemptArgs {
    /// NAMESPACE/POD, as `steadfast anchor status` names it
    workload: String,
    /// Why, for those who come after you
    #[arg(long, value_name = "TEXT")]
    reason: String,
    #[command(flatten)]
    mesh: MeshArgs,
    #[command(flatten)]
    order: OrderArgs,
}

/// Wait for an exempted workload again
#[derive(Debug, clap::Args)]
pub(super) struct UnexemptArgs {
    /// NAMESPACE/POD, or the UID of the pod
    workload: String,
    #[command(flatten)]
    mesh: MeshArgs,
}

pub(super) async fn exempt(args: ExemptArgs) -> Result<(), Problem> {
    let (controller, _) = Controller::find(&args.mesh.dir.dir, &args.mesh.controller).await?;
    let round = controller.round().await?.ok_or(AnchorError::Unasked)?;
    let instance = instance(&args.workload, &round)?;
    let question = format!(
        "Rotations go on without {}: until it answers again, others may refuse it. Exempt it?",
        args.workload
    );
    confirm(&question, &args.order, args.mesh.output)?;
    let (reason, by) = (format!("{}: {}", args.workload, args.reason), args.order.by.clone());
    change(&args.mesh, |state| {
        state.exempt(instance.clone(), reason.clone(), by.clone());
        Ok(())
    })
    .await?;
    said(args.mesh.output, &format!("{} is exempt until it answers or starts anew", args.workload))
}

/// The newest instance of a pod that anybody knows; one that nobody has heard of is exempted as
/// such, until it starts.
fn instance(workload: &str, round: &Round) -> Result<Instance, AnchorError> {
    let members = round.replicas.iter().flat_map(|replica| &replica.members);
    let known = members.filter(|m| m.name == workload || m.instance.pod_uid == workload);
    let newest = known.map(|member| member.instance.clone()).max_by_key(|i| i.started_at);
    let vanished = round.vanished.iter().find(|gone| gone.name == workload);
    let listed = round.listed.iter().find(|listed| listed.name == workload);
    let unheard = listed.map(|listed| Instance {
        pod_uid: listed.pod_uid.clone(),
        started_at: UnixTime::default(),
    });
    let found = newest.or_else(|| vanished.map(|gone| gone.instance.clone())).or(unheard);
    found.ok_or_else(|| {
        let names = round.listed.iter().map(|listed| listed.name.as_str());
        let near = nearest(workload, names);
        let hint = near.first().map_or_else(String::new, |near| format!("; did you mean {near}?"));
        AnchorError::Unknown { workload: workload.to_owned(), hint }
    })
}

pub(super) async fn unexempt(args: UnexemptArgs) -> Result<(), Problem> {
    let state = trust_domain::read(&args.mesh.dir.dir).await?;
    // The reason begins with the name that it was exempted by.
    let is_it = |exemption: &&Exemption| {
        exemption.instance.pod_uid == args.workload
            || exemption.reason.split_once(": ").is_some_and(|(name, _)| name == args.workload)
    };
    let Some(exemption) = state.exemptions.iter().find(is_it) else {
        let exempt = state.exemptions.iter().map(|e| e.reason.clone()).collect();
        let workload = args.workload;
        return Err(AnchorError::NotExempt { workload, exempt }.into());
    };
    change(&args.mesh, |state| state.unexempt(&exemption.instance.pod_uid)).await?;
    said(args.mesh.output, &format!("{} is waited for again", args.workload))
}
