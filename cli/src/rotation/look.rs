//! One look at the controller: what it waits for, for an anchor and for the issuer, and what keeps
//! it from its work.

use steadfast_process::ErrorChain;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::controller::{Standing, Wait};

use crate::controller::{Controller, ControllerArg, ControllerError};
use crate::mesh::Mesh;

/// What the controller said.
#[derive(Debug)]
pub(crate) struct Look(Result<Standing, ControllerError>);

impl Look {
    /// Asks.
    pub(crate) async fn at(mesh: &Mesh, arg: &ControllerArg) -> Self {
        Self(Controller::find(mesh, arg).await.map(|(_, standing)| standing))
    }

    /// A controller that says this.
    #[cfg(test)]
    pub(crate) const fn for_test(standing: Standing) -> Self {
        Self(Ok(standing))
    }

    /// What the rotation of an anchor waits for, or what wants one.
    pub(crate) fn wait(&self, state: &TrustDomainState) -> Option<&Wait> {
        self.standing_of(state)?.waiting.as_ref()
    }

    /// What the rotation of the issuer waits for.
    pub(crate) fn issuer_wait(&self, state: &TrustDomainState) -> Option<&Wait> {
        self.standing_of(state)?.issuer_waiting.as_ref()
    }

    /// What keeps everything where it is: nothing is issued, or the controller cannot do its work,
    /// or none answers.
    pub(crate) fn trouble(&self, state: &TrustDomainState) -> Option<String> {
        let trouble = match &self.0 {
            Ok(standing) => standing.trouble.clone(),
            Err(error) => Some(ErrorChain(error).to_string()),
        };
        state.halted.map(super::waiting::halted).or(trouble)
    }

    /// What the controller said, if it was about what the store holds now.
    fn standing_of(&self, state: &TrustDomainState) -> Option<&Standing> {
        let phase = |state: &TrustDomainState| {
            let rotation =
                state.rotation.as_ref().map(|r| (r.number, r.phase.name(), r.turned_back));
            (rotation, state.issuer_rotation.as_ref().map(|r| r.phase), state.paused)
        };
        let standing = self.0.as_ref().ok()?;
        standing.state.as_ref().is_some_and(|seen| phase(seen) == phase(state)).then_some(standing)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use steadfast_api::UnixTime;
    use steadfast_rotation_protocol::trust_domain::Halt;

    use super::*;

    const NOW: UnixTime = UnixTime::from_secs(1_800_000_000);

    fn state() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        steadfast_identity::authority::found(&domain, NOW).unwrap().state
    }

    fn look(state: &TrustDomainState) -> Look {
        Look::for_test(Standing {
            state: Some(state.clone()),
            waiting: Some(Wait::Key),
            issuer_waiting: Some(Wait::Round),
            ..Standing::default()
        })
    }

    #[test]
    fn the_issuer_s_wait_is_told_beside_that_of_an_anchor() {
        let state = state();
        let look = look(&state);
        assert_eq!(look.wait(&state), Some(&Wait::Key));
        assert_eq!(look.issuer_wait(&state), Some(&Wait::Round));
    }

    #[test]
    fn what_was_waited_for_in_another_phase_is_not_told() {
        let before = state();
        let mut state = before.clone();
        state.rotate_issuer("ann".to_owned(), Some(Duration::from_secs(600)), NOW).unwrap();
        let look = look(&before);
        assert_eq!((look.wait(&state), look.issuer_wait(&state)), (None, None));
    }

    #[test]
    fn what_is_halted_says_so_and_what_to_do() {
        let mut state = state();
        assert_eq!(look(&state).trouble(&state), None);
        state.halted = Some(Halt::Restored { seen_seq: 9 });
        let trouble = look(&state).trouble(&state).unwrap();
        assert!(trouble.contains("steadfast trust recover"), "{trouble}");
    }
}
