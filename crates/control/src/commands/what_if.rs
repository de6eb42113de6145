//! `what-if`: the graph that a command would leave, or why it would be refused.

use std::rc::Rc;

use dolmen_qmp::model::BlockGraph;
use dolmen_qmp::schema::{Field, Shape, Ty};
use dolmen_qmp::{ErrorClass, QmpError, Source, json as qmp_json};
use dolmen_rt::LocalFuture;
use dolmen_types::Options;
use serde_json::json;

use crate::act::{self, Act, Proposal, Wait};
use crate::guard::Guard;
use crate::row::{CommandRow, MakeCx};
use crate::world::{Answer, Done, World};

struct WhatIf {
    /// The command; `None` for a query, which changes nothing.
    asked: Result<Option<Box<dyn Act>>, QmpError>,
}

impl WhatIf {
    /// # Errors
    /// When it is no question: there is no such command.
    fn from_options(cx: &MakeCx<'_>, mut o: Options) -> Result<WhatIf, QmpError> {
        let command = o.require_str("command")?;
        if command == cx.name {
            return Err(QmpError::generic("what-if asks about commands, not about itself"));
        }
        let arguments = o.take("arguments").map_or_else(|| json!({}), |v| qmp_json::from_value(&v));
        let asked = match cx.schema.check_command(&command, arguments, Source::Json) {
            Err(e) if e.class == ErrorClass::CommandNotFound => return Err(e),
            Err(e) => Err(e),
            Ok((name, arguments)) => {
                let row = cx.table.find(name)?;
                Options::from_value(arguments)
                    .map_err(QmpError::from)
                    .and_then(|o| row.act(cx.table, cx.schema, o))
            }
        };
        Ok(WhatIf { asked })
    }
}

impl Act for WhatIf {
    /// For what the command would wait for.
    fn wait(&self, world: &World) -> Wait {
        match &self.asked {
            Ok(Some(act)) => act.wait(world),
            Ok(None) | Err(_) => Wait::Nothing,
        }
    }

    /// It is no proposal: it makes one, and drops it.
    fn propose<'a>(&'a mut self, _: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async { Ok(()) })
    }

    fn perform(self: Box<Self>, world: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async move {
            Ok(match self.asked {
                Ok(Some(act)) => act::what_if(&world, act).await,
                Ok(None) => act::what_if(&world, Box::new(Nothing)).await,
                Err(why) => act::refused(&why),
            })
        })
    }
}

/// What a query changes.
struct Nothing;

impl Act for Nothing {
    fn wait(&self, _: &World) -> Wait {
        Wait::Nothing
    }

    fn propose<'a>(&'a mut self, _: &'a mut Proposal<'_>) -> LocalFuture<'a, Done> {
        Box::pin(async { Ok(()) })
    }

    fn perform(self: Box<Self>, _: Rc<World>, _: Option<Guard>) -> LocalFuture<'static, Answer> {
        Box::pin(async { Ok(json!({})) })
    }
}

static ARGUMENTS: Shape =
    Shape::of(&[Field::required("command", Ty::Str), Field::optional("arguments", Ty::Any)]);
static RETURNS: Shape = Shape::of(&[
    Field::required("allowed", Ty::Bool),
    Field::optional("graph", BlockGraph::TY),
    Field::optional("error", Ty::Any),
    Field::optional("job-error", Ty::Any),
]);

pub(crate) const ROWS: &[CommandRow] = &[CommandRow::change(
    "what-if",
    Ty::Object(&ARGUMENTS),
    |cx, o| Ok(Box::new(WhatIf::from_options(cx, o)?)),
    "The graph that a command would leave, or why it would be refused; nothing changes. Of a command that starts a job \
     which is known to fail, job-error says why.",
)
.returns(Ty::Object(&RETURNS))];
