//! The handle that everybody but the task holds.

use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use async_channel::Sender;
use dolmen_graph::{Graph, GraphOwner, common_options};
use dolmen_qmp::schema::Branch;
use dolmen_qmp::{QmpError, Request, Schema};
use dolmen_rt::Rt;
use dolmen_types::Options;
use serde_json::Value as Json;

use crate::act::{self, Act};
use crate::jobs::JobStart;
use crate::row::Kind;
use crate::table::{self, TABLE};
use crate::task::{self, Order};
use crate::turns::Scope;
use crate::world::{Answer, Config, ENDING, World};

/// The handle of a control task. Cheap to clone; stays on the task's core.
#[derive(Clone)]
pub struct Control {
    world: Rc<World>,
    orders: Sender<Order>,
}

impl Control {
    /// Starts a control task with an empty graph. It runs until [`Control::quit`].
    pub fn start(rt: &Rt, config: Config) -> Control {
        Control::start_with(rt, config, GraphOwner::new(rt.clone()))
    }

    /// The same without access control, for tests that show what it prevents.
    #[doc(hidden)]
    pub fn start_unchecked(rt: &Rt, config: Config) -> Control {
        Control::start_with(rt, config, GraphOwner::unchecked(rt.clone()))
    }

    fn start_with(rt: &Rt, config: Config, owner: GraphOwner) -> Control {
        let drivers: Vec<Branch> = config
            .registry
            .rows()
            .iter()
            .map(|d| Branch { name: d.name, options: d.options, features: &[] })
            .collect();
        let schema = table::schema(common_options(), &drivers);
        let (world, returns) = World::new(rt, config, schema, TABLE.counters().collect(), owner);
        // As many changes wait as there are monitors: each waits for its own.
        let (orders, queue) = async_channel::unbounded();
        rt.spawn(task::run(world.clone(), returns, queue));
        Control { world, orders }
    }

    pub(crate) fn world(&self) -> &World {
        &self.world
    }

    /// The commands and types of this program.
    pub fn schema(&self) -> &Schema {
        &self.world.schema
    }

    /// The runtime that the task runs on.
    pub fn rt(&self) -> &Rt {
        &self.world.rt
    }

    /// The snapshot that the last change left.
    pub fn graph(&self) -> Arc<Graph> {
        self.world.owner.graph()
    }

    /// Executes a checked command: a query or a verb at once, a change when its turn comes.
    ///
    /// # Errors
    /// As the command says.
    pub async fn execute(&self, request: &Request) -> Result<Json, QmpError> {
        let row = TABLE.find(request.name)?;
        let arguments = Options::from_value(request.arguments.clone())?;
        if let Kind::Query(answer) = row.kind {
            return answer(&self.world, arguments);
        }
        let Some(act) = row.act(TABLE, &self.world.schema, arguments)? else { return Err(ending()) };
        if !matches!(row.kind, Kind::Verb(_)) {
            return self.send(act, request.name, Scope::of(&request.arguments)).await;
        }
        match self.world.ended.get() {
            true => Err(ending()),
            false => act::at_once(&self.world, act).await,
        }
    }

    /// Executes a command by its name, with arguments that fit it.
    ///
    /// # Errors
    /// As the command says.
    pub async fn command(&self, name: &'static str, arguments: Options) -> Result<Json, QmpError> {
        self.execute(&Request { name, arguments: arguments.into_value(), id: None }).await
    }

    /// Starts a job of any kind.
    ///
    /// # Errors
    /// Why the job can't be.
    pub async fn start_job(&self, start: JobStart) -> Result<Json, QmpError> {
        let act = Box::new(act::Publish::new(Box::new(start)));
        self.send(act, "a job", Scope::All).await
    }

    /// Ends the program in an orderly way. Nobody waits any more for what may take for ever.
    pub fn quit(&self) {
        self.world.end();
    }

    async fn send(&self, act: Box<dyn Act>, what: &str, scope: Scope) -> Answer {
        let (reply, result) = async_channel::bounded(1);
        let order = Order { act, what: what.to_owned(), scope, reply };
        self.orders.send(order).await.map_err(|_| ending())?;
        result.recv().await.map_err(|_| ending())?
    }

    /// Whether a command ends the program.
    pub(crate) fn ends(&self, request: &Request) -> bool {
        TABLE.find(request.name).is_ok_and(|row| row.ends_program)
    }

    /// The end is wanted: what may take for ever is given up.
    pub(crate) fn hurry(&self) {
        self.world.raise(&self.world.hurry);
    }

    /// Whether the end has been asked for.
    pub(crate) fn is_ending(&self) -> bool {
        self.world.hurry.get()
    }

    /// Completes when the task has begun to end.
    pub async fn quitting(&self) {
        self.world.until(&self.world.quitting).await;
    }

    /// Completes when everything is closed.
    pub async fn ended(&self) {
        self.world.until(&self.world.ended).await;
    }

    /// Whether some node could not be closed so far: data may be lost, and the program's exit code must say so.
    pub fn is_unclean(&self) -> bool {
        self.world.unclean.get()
    }
}

fn ending() -> QmpError {
    QmpError::generic(ENDING)
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control({:?})", self.graph())
    }
}
