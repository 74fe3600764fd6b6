//! The anchor that a rotation is to go to, as a person names it: a file, or the id of an anchor that
//! was imported. Nothing is changed here: a file joins the state with the order.

use std::path::Path;

use steadfast_api::KeyId;
use steadfast_rotation_protocol::TrustDomainState;
use steadfast_rotation_protocol::import::ImportRefused;
use steadfast_rotation_protocol::trust_domain::{AnchorRecord, AnchorState};

use crate::commands::anchor_import::{self, ImportProblem};
use crate::problem::Problem;

use super::AnchorError;

/// An anchor that a rotation may be ordered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    /// As the state knows it, or would.
    pub(crate) record: AnchorRecord,
    /// What the person has written.
    name: String,
}

/// What is at this path; or the anchor of this id, if there is no such file.
///
/// # Errors
/// It is no anchor, or none that may become active: withdrawn, or in the bundle already.
pub(crate) fn find(path: &Path, state: &TrustDomainState) -> Result<Given, Problem> {
    let name = path.display().to_string();
    let record = match path.exists() {
        true => anchor_import::parsed(state, path, &anchor_import::read(path)?)?,
        false => known(&name, state)?,
    };
    let given = Given { record, name };
    given.join(&mut state.clone())?;
    Ok(given)
}

impl Given {
    /// Takes it in, where that has not been done.
    ///
    /// # Errors
    /// It is withdrawn, or published, or may not join for another reason.
    pub(crate) fn join(&self, state: &mut TrustDomainState) -> Result<(), ImportProblem> {
        let there = state.anchor(self.record.id);
        let waits = there.is_some_and(|there| {
            there.state == AnchorState::Generated && there.der == self.record.der
        });
        if waits {
            return Ok(());
        }
        let gone = there.is_some_and(|there| there.state == AnchorState::Withdrawn);
        let joined = match gone {
            true => Err(ImportRefused::Tombstoned(self.record.id.to_string())),
            false => state.import_anchor(self.record.clone()).map(drop),
        };
        joined.map_err(|refused| ImportProblem::Refused { file: self.name.clone().into(), refused })
    }
}

/// The anchor whose id begins so; one that was withdrawn is refused as that.
fn known(text: &str, state: &TrustDomainState) -> Result<AnchorRecord, Problem> {
    let lower = text.to_ascii_lowercase();
    let is_it = |id: &&KeyId| id.to_string().starts_with(&lower);
    match super::find(text, state) {
        Ok(id) => Ok(state.anchor(id).cloned().ok_or_else(|| AnchorError::NoFile(text.into()))?),
        Err(AnchorError::NoAnchor(_)) => match state.tombstones.iter().find(is_it) {
            Some(gone) if lower.len() >= ID_CHARS_MIN => {
                let refused = ImportRefused::Tombstoned(gone.to_string());
                Err(ImportProblem::Refused { file: text.into(), refused }.into())
            }
            _ => Err(AnchorError::NoFile(text.to_owned()).into()),
        },
        Err(ambiguous) => Err(ambiguous.into()),
    }
}

/// Less says nothing of what is no longer there.
const ID_CHARS_MIN: usize = 4;

#[cfg(test)]
mod tests {
    use steadfast_api::UnixTime;

    use super::*;

    fn founded() -> TrustDomainState {
        let domain = "cluster.local".parse().unwrap();
        let now = UnixTime::from_secs(1_800_000_000);
        steadfast_identity::authority::found(&domain, now).unwrap().state
    }

    /// A trust domain, and the certificate of another one's anchor, as from another CA.
    fn with_root() -> (TrustDomainState, tempfile::TempDir, std::path::PathBuf, KeyId) {
        use steadfast_process::{Clock as _, SystemClock};
        let domain = "cluster.local".parse().unwrap();
        let other = steadfast_identity::authority::found(&domain, SystemClock.now()).unwrap();
        let other = other.state.active_anchor().unwrap().clone();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("root.pem");
        std::fs::write(&path, crate::output::pem(&other.der)).unwrap();
        (founded(), dir, path, other.id)
    }

    #[test]
    fn a_file_joins_a_state_once_and_finding_it_changes_nothing() {
        let (mut state, _dir, path, id) = with_root();
        let given = find(&path, &state).unwrap();
        assert_eq!((given.record.id, state.anchor(id)), (id, None));
        given.join(&mut state).unwrap();
        assert_eq!(state.anchor(id).unwrap().state, AnchorState::Generated);
        let once = state.clone();
        given.join(&mut state).unwrap();
        assert_eq!(state, once);
        assert_eq!(find(Path::new(&id.short()), &state).unwrap().record.id, id);
    }

    #[test]
    fn what_was_withdrawn_is_refused_by_name_as_a_file_and_as_an_id() {
        let (mut state, _dir, path, id) = with_root();
        state.tombstones.push(id);
        for name in [path.as_path(), Path::new(&id.short())] {
            let refused = find(name, &state).unwrap_err();
            let words = [name.display().to_string(), id.to_string(), "was withdrawn".to_owned()];
            for word in words {
                assert!(refused.text().contains(&word), "{word:?} is not in {}", refused.text());
            }
        }
        // On its way out it is still among the anchors.
        let active = state.active_anchor().unwrap().id;
        for anchor in &mut state.anchors {
            anchor.state = AnchorState::Withdrawn;
        }
        let refused = find(Path::new(&active.short()), &state).unwrap_err();
        assert!(refused.text().contains("was withdrawn"), "{}", refused.text());
    }

    #[test]
    fn an_anchor_of_the_bundle_and_a_name_of_nothing_are_refused() {
        let state = founded();
        let active = state.active_anchor().unwrap().id.short();
        let refused = find(Path::new(&active), &state).unwrap_err();
        assert!(refused.text().contains("already (active)"), "{}", refused.text());
        let refused = find(Path::new("root-2027.pem"), &state).unwrap_err();
        assert!(refused.text().contains("there is no file root-2027.pem"), "{}", refused.text());
    }
}
