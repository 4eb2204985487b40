"""Scopes: where a name of the program lives, decided before it runs."""

import ast

FUNCTIONS = (ast.FunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Scope:
  """Names bound by a module, class, function or comprehension.

  kind: 'module', 'class', 'function' or 'comprehension'.
  """

  def __init__(self, kind: str, parent: 'Scope | None' = None):
    self.kind = kind
    self.parent = parent
    self.bound = set()
    self.globals = set()
    self.nonlocals = set()
    self.has_yield = False
    self.private = parent.private if parent else None  # class of its __names

  def mangle(self, name: str) -> str:
    """A class's name of its own __name."""
    if self.private and name.startswith('__') and not name.endswith('__'):
      return f'_{self.private}{name}'
    return name

  def hops(self, name: str, own: bool = True) -> int | None:
    """Calls outwards to the one that holds a name; None: it is global.

    own: whether a class body sees the names of its class.
    """
    scope, count = self, 0
    while scope.kind != 'module':
      if name in scope.globals:
        return None
      visible = (scope is self and own) or scope.kind != 'class'
      if visible and name in scope.bound:
        return count
      scope, count = scope.parent, count + 1
    return None

  def check_nonlocals(self) -> None:
    for name in sorted(self.nonlocals):
      scope = self.parent
      while scope and not (scope.kind == 'function' and name in scope.bound):
        scope = scope.parent
      if scope is None or self.kind == 'module':
        raise SyntaxError(f'no binding for nonlocal {name!r} found')


class _Binder(ast.NodeVisitor):
  """Notes the names that a body binds, scopes inside it left out."""

  def __init__(self, scope: Scope):
    self.scope = scope
    self.used = set()

  def bind(self, name: str) -> None:
    name = self.scope.mangle(name)
    self.used.add(name)
    if name not in self.scope.globals and name not in self.scope.nonlocals:
      self.scope.bound.add(name)

  def visit_Name(self, node):
    if isinstance(node.ctx, ast.Load):
      self.used.add(self.scope.mangle(node.id))
    else:
      self.bind(node.id)

  def visit_FunctionDef(self, node):
    self.bind(node.name)
    for child in (*node.decorator_list, *_defaults(node.args)):
      self.visit(child)

  def visit_Lambda(self, node):
    for child in _defaults(node.args):
      self.visit(child)

  def visit_ClassDef(self, node):
    self.bind(node.name)
    for child in (*node.decorator_list, *node.bases):
      self.visit(child)

  def visit_comprehension_scope(self, node):
    self.visit(node.generators[0].iter)
    _Walrus(self).visit(node)

  visit_ListComp = visit_SetComp = visit_comprehension_scope
  visit_DictComp = visit_GeneratorExp = visit_comprehension_scope

  def visit_ExceptHandler(self, node):
    if node.name:
      self.bind(node.name)
    self.generic_visit(node)

  def visit_Import(self, node):
    for alias in node.names:
      self.bind((alias.asname or alias.name).split('.')[0])

  visit_ImportFrom = visit_Import

  def visit_Global(self, node):
    self.declare(node, self.scope.globals, 'global')

  def visit_Nonlocal(self, node):
    if self.scope.kind == 'module':
      raise SyntaxError('nonlocal declaration not allowed at module level')
    self.declare(node, self.scope.nonlocals, 'nonlocal')

  def declare(self, node, names: set, kind: str) -> None:
    for name in map(self.scope.mangle, node.names):
      if name in self.used or name in self.scope.bound:
        raise SyntaxError(
          f'name {name!r} is used or bound before its {kind} declaration'
        )
      other = self.scope.globals if kind == 'nonlocal' else self.scope.nonlocals
      if name in other:
        raise SyntaxError(f'name {name!r} is nonlocal and global')
      names.add(name)

  def visit_AnnAssign(self, node):
    self.visit(node.target)
    if node.value:
      self.visit(node.value)

  def visit_Yield(self, node):
    self.scope.has_yield = True
    self.generic_visit(node)

  visit_YieldFrom = visit_Yield


class _Walrus(ast.NodeVisitor):
  """Binds the := targets of a comprehension in the scope around it."""

  def __init__(self, binder: _Binder):
    self.binder = binder

  def visit_NamedExpr(self, node):
    self.binder.bind(node.target.id)
    self.generic_visit(node)

  def visit_Lambda(self, node):
    pass


def _defaults(args: ast.arguments) -> list:
  return [*args.defaults, *(d for d in args.kw_defaults if d)]


def make_scope(kind: str, parent: Scope | None, body: list, names=()) -> Scope:
  """The scope of a body of nodes; names are those of its parameters."""
  scope = Scope(kind, parent)
  if kind == 'class':
    scope.private = names[0].lstrip('_')
  else:
    scope.bound.update(map(scope.mangle, names))
  binder = _Binder(scope)
  for node in body:
    binder.visit(node)
  scope.check_nonlocals()
  return scope


def comprehension_scope(node, parent: Scope) -> Scope:
  """The scope of a comprehension: its targets, without its := ones."""
  scope = Scope('comprehension', parent)
  for generator in node.generators:
    for child in ast.walk(generator.target):
      if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
        scope.bound.add(scope.mangle(child.id))
    if _has_walrus(generator.iter):
      raise SyntaxError(
        'assignment expression cannot be used in a comprehension iterable '
        'expression'
      )
  if parent.kind == 'class' and _has_walrus(node):
    raise SyntaxError(':= in a comprehension of a class body')
  return scope


def _has_walrus(node) -> bool:
  return any(isinstance(child, ast.NamedExpr) for child in ast.walk(node))


def check_depth(tree: ast.AST, limit: int) -> int:
  """Depth of a tree, without recursion; stops above the limit."""
  level, depth = [tree], 0
  while level:
    depth += 1
    if depth > limit:
      return depth
    level = [child for node in level for child in ast.iter_child_nodes(node)]
  return depth
